"""TomeMatch under the Triton interpreter, and on a GPU if there is one, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pairwise import pairwise

from tome_export.merge import ops, reference, spec
from tome_export.parity.compare import fp32_score_bound
from tome_export.parity.decisions import Plan, disagreements
from tome_export.plugins import torch_ops
from tome_export.plugins.match import contract

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOKENS = (2, 3, 4, 5, 50, 101, 197, 198, 257, 577, 1025)
PREFIXES = (0, 1, 2, 5)
R = ("none", "one", "half", "most")
ORDERS = {"by_rank": False, "by_position": True}


def amount(name, tokens, prefix):
    most = spec.clamp_r(tokens, tokens, prefix)
    return {"none": 0, "one": min(1, most), "half": most // 2, "most": most}[name]


def lattice(batch, heads, tokens, width, seed=0):
    """Keys whose mean over heads is a row of +-s, s a power of two of each token's own.

    They fit every dtype, and all of fp32 arithmetic on them but the scale common to all scores is
    exact, so equal scores tie and plans have to be equal. A third of the tokens are duplicates.
    """
    rng = np.random.default_rng([seed, batch, heads, tokens, width])
    mean = rng.choice([-1.0, 1.0], (batch, 1, tokens, width))
    for image in range(batch):
        copies = rng.choice(tokens, tokens // 3)
        mean[image, :, copies] = mean[image, :, rng.choice(tokens, tokens // 3)]
    apart = rng.choice([-0.5, 0.0, 0.5], (batch, heads, tokens, width))
    apart[:, 1::2] = -apart[:, : heads // 2 * 2 : 2]
    if heads % 2:
        apart[:, -1] = 0.0
    scale = 2.0 ** rng.integers(-3, 4, (batch, 1, tokens, 1))
    return torch.from_numpy((mean + apart) * scale).float()


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def scores_of(keys):
    """``[B, N, N]`` float64 cosines; a token whose norm is not finite in fp32 scores 0."""
    metric = keys.double().numpy()
    if metric.ndim == 4:
        with np.errstate(invalid="ignore"):  # infinity - infinity
            metric = metric.mean(1)
    with np.errstate(over="ignore"):
        norm = np.sqrt((metric * metric).sum(-1))
    metric = np.where((norm < spec.NORM_LIMIT)[..., None], metric, 0.0)
    norm = np.maximum(np.where(norm < spec.NORM_LIMIT, norm, 0.0), spec.NORM_EPS)
    products = metric @ metric.swapaxes(1, 2)
    return products / (norm[:, :, None] * norm[:, None, :])


def masked(scores, prefix):
    """Set A against set B of one image: ``[ceil(N/2), floor(N/2)]``, prefix tokens -inf."""
    out = scores[::2, 1::2].copy()
    out[: (prefix + 1) // 2] = -np.inf
    out[:, : prefix // 2] = -np.inf
    return out


def plan_from_scores(scores, r, prefix, class_token):
    """The plan of one image from ``masked`` scores, quicker than the reference's loops."""
    tokens = sum(scores.shape)
    value = scores.max(1, initial=-np.inf)
    rank = np.argsort(-value, kind="stable")
    rank = rank[rank >= (prefix + 1) // 2]
    stay = np.sort(rank[r:]) if class_token else rank[r:]
    odd = np.arange(1, tokens, 2)
    keep = np.concatenate([np.arange(prefix), 2 * stay, odd[odd >= prefix]])
    dst = scores.argmax(1)[rank[:r]] + len(keep) - len(odd) if r else np.array([], int)
    return Plan(keep, 2 * rank[:r], dst)


def plans(result):
    """Plans of all images, from ``keep [B, K]``, ``src [B, r]``, ``dst [B, r]``."""
    assert {part.dtype for part in result} == {torch.int32}
    return [
        Plan(*(part[image].cpu().numpy() for part in result)) for image in range(len(result[0]))
    ]


def assert_equal(result, keys, r, prefix, class_token):
    for ours, scores in zip(plans(result), scores_of(keys), strict=True):
        expected = plan_from_scores(masked(scores, prefix), r, prefix, class_token)
        for name in ("keep", "src", "dst"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), name)


def assert_within_rounding(result, keys, r, prefix, class_token):
    """Equal, but where the scores that a decision hangs on are as close as fp32 can tell apart."""
    bound = 2 * fp32_score_bound(keys.shape[-1])
    for ours, full in zip(plans(result), scores_of(keys), strict=True):
        scores = masked(full, prefix)
        expected = plan_from_scores(scores, r, prefix, class_token)
        found = disagreements(expected, ours, scores, prefix, class_token, 0)
        assert [d for d in found if d.margin > bound] == []
        merged = scores.max(1, initial=-np.inf)[ours.src // 2]
        assert (np.diff(merged) <= bound).all(), "src is not in the order of rank"


@pairwise(
    "tokens, prefix, class_token, strange",
    (2, 3, 9, 16, 17),
    PREFIXES,
    ORDERS,
    (False, True),
    where=lambda tokens, prefix, *_: prefix <= tokens,
)
def test_quick_oracle_is_the_reference(tokens, prefix, class_token, strange):
    keys, class_token = lattice(1, 3, tokens, 16), ORDERS[class_token]
    if strange:
        keys[0, 1, tokens // 2, 3] = torch.nan
    for r in {amount(name, tokens, prefix) for name in R} - {0}:
        quick = plan_from_scores(masked(scores_of(keys)[0], prefix), r, prefix, class_token)
        rows = reference.mean_keys(keys[0].double().tolist())
        expected = reference.match(rows, r, prefix, class_token)
        assert quick.keep.tolist() == expected.keep
        assert quick.src.tolist() == expected.src
        assert quick.dst.tolist() == expected.dst


@pairwise(
    "tokens, prefix, order",
    TOKENS,
    PREFIXES,
    ORDERS,
    # Of the many tokens, which the interpreter is slow at, half the cases.
    where=lambda tokens, prefix, order: (
        prefix <= tokens and (tokens < 300 or ORDERS[order] == prefix % 2)
    ),
)
def test_ties_and_duplicates(interpreter, tokens, prefix, order):
    class_token = ORDERS[order]
    keys = lattice(2 if tokens < 100 else 1, 2, tokens, 16)
    for name in R if tokens < 100 else ("half",):
        r = amount(name, tokens, prefix)
        result = interpreter("match", keys, r, prefix, class_token)
        assert_equal(result, keys, r, prefix, class_token)


@pairwise("dtype, width, heads", DTYPES, (8, 16, 24, 64, 72, 80, 130), (0, 1, 3, 12))
def test_dtypes_widths_and_heads(interpreter, dtype, width, heads):
    """Without heads the keys are a metric."""
    keys = lattice(2, max(1, heads), 21, width)
    keys = (keys if heads else keys[:, 0]).to(DTYPES[dtype])
    result = interpreter("match", keys, 6, 1, True)
    assert_equal(result, keys, 6, 1, True)


@pairwise("tokens, batch, dtype", (50, 101, 197), (1, 2, 5), DTYPES)
def test_random_keys(interpreter, tokens, batch, dtype):
    keys = normal(batch, 3, tokens, 24, seed=tokens).to(DTYPES[dtype])
    for r, prefix, class_token in ((tokens // 3, 1, True), ((tokens - 2) // 2, 2, False)):
        result = interpreter("match", keys, r, prefix, class_token)
        assert_within_rounding(result, keys, r, prefix, class_token)


def transposed_qkv(keys):
    """The keys as a view of the packed output ``[B, N, 3, H, D]`` of a qkv layer."""
    batch, heads, tokens, width = keys.shape
    packed = torch.full((batch, tokens, 3, heads, width), torch.nan, dtype=keys.dtype)
    packed[:, :, 1] = keys.transpose(1, 2)
    return packed.permute(2, 0, 3, 1, 4)[1]


LAYOUTS = {
    "qkv": transposed_qkv,
    "heads_last": lambda keys: keys.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
    "batch_inside": lambda keys: keys.transpose(0, 1).contiguous().transpose(0, 1),
    "every_second_token": lambda keys: keys.repeat_interleave(2, 2)[:, :, ::2],
    "odd_stride": lambda keys: torch.cat([keys, keys[..., :3]], -1)[..., : keys.shape[-1]],
    "expanded_heads": lambda keys: keys[:, :1].expand_as(keys),
    "metric_slice": lambda keys: keys[:, 1],
    "one_image_of_many": lambda keys: keys.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [8, 24, 72])
def test_layouts(interpreter, width, layout):
    keys = LAYOUTS[layout](lattice(3, 3, 37, width).half())
    assert not keys.is_contiguous()
    result = interpreter("match", keys, 9, 1, False)
    assert_equal(result, keys, 9, 1, False)


# Columns W of the product and the first of the keys, for H heads of D: the QKV projection's, the
# keys' own, the keys at the end, and numbers with no common factor.
PRODUCTS = {
    "qkv": lambda h, d: (3 * h * d, h * d),
    "own": lambda h, d: (h * d, 0),
    "last": lambda h, d: (2 * h * d + 4, h * d + 4),
    "odd": lambda h, d: (3 * h * d + 5, h * d + 3),
}


def in_product(keys, columns, offset):
    """A product ``[B, N, W]`` of NaN but for the keys, and the attributes that say where."""
    batch, heads, tokens, width = keys.shape
    product = torch.full((batch, tokens, columns), torch.nan, dtype=keys.dtype)
    product[..., offset : offset + heads * width] = keys.transpose(1, 2).flatten(2)
    return product, {"heads": heads, "width": width, "offset": offset}


@pairwise("layout, dtype, prefix", PRODUCTS, DTYPES, PREFIXES)
def test_keys_in_a_product(interpreter, layout, dtype, prefix):
    """Ties and duplicates; a column too early or too late would be NaN."""
    for heads, tokens, width, class_token in ((3, 37, 24, True), (1, 12, 5, False)):
        keys = lattice(2, heads, tokens, width).to(DTYPES[dtype])
        product, where = in_product(keys, *PRODUCTS[layout](heads, width))
        r = amount("half", tokens, prefix)
        result, untouched = interpreter("match_guarded", product, r, prefix, class_token, **where)
        assert untouched
        assert_equal(result, keys, r, prefix, class_token)


def test_more_tokens_of_a_product_than_a_tile_holds(interpreter):
    keys = lattice(2, 2, 2 * contract.BLOCK_A + 3, 16).half()
    product, where = in_product(keys, *PRODUCTS["qkv"](2, 16))
    result, _ = interpreter("match_guarded", product, 50, 1, True, **where)
    assert_equal(result, keys, 50, 1, True)


def test_strange_keys_in_a_product(interpreter):
    for edit in (one_nan, all_nan, infinities, opposite_infinities, overflow, zeros, all_equal):
        keys = lattice(2, 2, 29, 16)
        edit(keys)
        product, where = in_product(keys, *PRODUCTS["qkv"](2, 16))
        result, _ = interpreter("match_guarded", product, 9, 1, True, **where)
        assert_equal(result, keys, 9, 1, True)


@pytest.mark.parametrize(
    ("columns", "offset", "unit"), [(2304, 768, 16), (2304, 776, 8), (2305, 768, 1), (768, 0, 16)]
)
def test_the_unit_divides_offset_and_strides(columns, offset, unit):
    *_, strides, offset = spec.keys_view((197, columns), 12, 64, offset)
    variant = contract.variant(197, 64, "float16", strides, offset)
    assert variant.constants["STRIDE_UNIT"] == unit
    launch = contract.launch(2, 12, 197, 64, 16, 1, True, strides, offset)
    scalars = dict(zip(contract.SCALARS, launch.scalars, strict=True))
    assert scalars["offset"] * unit == offset
    assert scalars["token_stride"] * unit == columns
    assert scalars["image_stride"] * unit == 197 * columns
    assert scalars["head_stride"] * unit == 64


def test_keys_that_reach_too_far_are_refused():
    *_, strides, offset = spec.keys_view((4096, 1 << 19), 12, 64, 0)
    assert contract.refusal(4096, 64, "float16", strides, offset) == (
        "the keys of an image reach over 2147483648 elements; the TomeMatch kernel counts to "
        "2147483647"
    )
    *_, strides, offset = spec.keys_view((4095, 1 << 19), 12, 64, 0)
    assert contract.refusal(4095, 64, "float16", strides, offset) is None


def test_keys_outside_their_product_are_refused():
    with pytest.raises(
        ValueError, match="3 heads of 8 columns from column 9 on; expected them ins"
    ):
        spec.keys_view((5, 32), 3, 8, 9)
    with pytest.raises(ValueError, match=r"has shape \[B, 2, 5, 32\]; expected 3D"):
        spec.keys_view((2, 5, 32), 3, 8, 0)


@pytest.mark.parametrize(("tokens", "times"), [(197, "1.5"), (577, "4"), (1025, "6.5")])
def test_keys_are_loaded_as_often_as_the_readme_says(interpreter, tokens, times):
    heads, width = 1, 8
    loaded = interpreter("keys_loaded", torch.ones(1, heads, tokens, width))
    a, b = -(-tokens // 2), tokens // 2
    tiles_a, tiles_b = -(-a // contract.BLOCK_A), -(-b // contract.BLOCK_B)
    assert loaded == heads * width * (b * tiles_a + a * tiles_b)
    assert f"{loaded / (heads * width * tokens):.1f}".removesuffix(".0") == times


def all_equal(keys):
    keys[:] = keys[:, :, :1].clone()


def zeros(keys):
    keys[:] = 0.0


def some_zeros(keys):
    keys[:, :, 3::5] = 0.0


def nan_token(keys):
    keys[:, :, 4] = torch.nan


def one_nan(keys):
    keys[:, 1, 5, 7] = torch.nan


def all_nan(keys):
    keys[:] = torch.nan


def infinities(keys):
    keys[:, 0, 6] = torch.inf
    keys[:, 0, 7, 2] = -torch.inf


def opposite_infinities(keys):
    keys[:, 0, 6, 1] = torch.inf
    keys[:, 1, 6, 1] = -torch.inf


def overflow(keys):
    keys[:, :, 2:6] *= 1e30


def overflow_of_sum_over_heads(keys):
    keys[:, :, 9] = 3e38


def tiny(keys):
    keys *= 2.0**-140


def large(keys):
    keys *= 2.0**58


EDITS = [
    all_equal,
    zeros,
    some_zeros,
    nan_token,
    one_nan,
    all_nan,
    infinities,
    opposite_infinities,
    overflow,
    overflow_of_sum_over_heads,
    large,
]


@pairwise("edit, prefix, order", EDITS, PREFIXES, ORDERS)
def test_strange_keys(interpreter, edit, prefix, order):
    keys, class_token = lattice(2, 2, 29, 16), ORDERS[order]
    edit(keys)
    r = amount("half", 29, prefix)
    result, untouched = interpreter("match_guarded", keys, r, prefix, class_token)
    assert untouched
    assert_equal(result, keys, r, prefix, class_token)


@pairwise("token, value, class_token", (6, 9), (0.0, torch.nan, torch.inf, 1e30), (False, True))
def test_no_direction_is_better_than_the_opposite(interpreter, token, value, class_token):
    """All of A points against all of B, so that a score of 0 is the best; 6 is in A, 9 in B."""
    keys = torch.ones(2, 2, 29, 16)
    keys[:, :, 1::2] = -1.0
    keys[:, :, token] = value
    result = interpreter("match", keys, 5, 1, class_token)
    assert_equal(result, keys, 5, 1, class_token)
    chosen = result[1][:, 0] if token == 6 else result[0].gather(1, result[2].long())
    assert (chosen == token).all()


def test_keys_below_the_norm_bound_are_ordered_within_rounding(interpreter):
    keys = lattice(2, 2, 29, 16)
    tiny(keys)
    assert_within_rounding(interpreter("match", keys, 9, 1, True), keys, 9, 1, True)


@pytest.mark.parametrize("edit", [one_nan, infinities, all_nan, zeros], ids=lambda e: e.__name__)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_strange_keys_in_half_precision(interpreter, dtype, edit):
    keys = lattice(2, 2, 29, 16).to(DTYPES[dtype])
    edit(keys)
    assert_equal(interpreter("match", keys, 9, 1, True), keys, 9, 1, True)


def test_a_tie_across_tiles_goes_to_the_lowest_index(interpreter):
    """More tokens in A and in B than one tile holds, all equal but one."""
    keys = torch.ones(1, 1, 4 * contract.BLOCK_A + 3, 8)
    keys[0, 0, 2 * contract.BLOCK_A + 4] = -1.0
    result = interpreter("match", keys, 200, 1, False)
    assert_equal(result, keys, 200, 1, False)
    assert set(result[2].flatten().tolist()) == {result[0].shape[1] - keys.shape[2] // 2}


@pairwise(
    "tokens, prefix, class_token, r",
    (2, 3, 4, 5, 8),
    PREFIXES,
    (False, True),
    ("none", "most"),
    where=lambda tokens, prefix, *_: prefix <= tokens,
)
def test_few_tokens_write_their_plan_and_nothing_else(interpreter, tokens, prefix, r, class_token):
    """Also where set A or set B has prefix tokens only."""
    keys, r = lattice(2, 1, tokens, 8), amount(r, tokens, prefix)
    result, untouched = interpreter("match_guarded", keys, r, prefix, class_token)
    assert untouched
    assert_equal(result, keys, r, prefix, class_token)


def test_the_most_tokens(interpreter):
    keys = lattice(1, 1, contract.MAX_TOKENS, 8)
    result = interpreter("match", keys, 1000, 1, True)
    assert_equal(result, keys, 1000, 1, True)


def test_the_widest_heads(interpreter):
    keys = normal(1, 1, 11, contract.MAX_WIDTH)
    assert_within_rounding(interpreter("match", keys, 3, 1, True), keys, 3, 1, True)


def test_no_image(interpreter):
    keep, src, dst = interpreter("match", torch.ones(0, 2, 9, 8), 3, 1, True)
    assert [tuple(part.shape) for part in (keep, src, dst)] == [(0, 6), (0, 3), (0, 3)]


def test_the_same_bits_again(interpreter):
    keys = normal(2, 3, 101, 64)
    first, again = (interpreter("match", keys, 30, 1, False) for _ in range(2))
    for ours, theirs in zip(first, again, strict=True):
        assert torch.equal(ours, theirs)


# What is refused -> (keys, r, prefix, the whole message).


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [5, 197, 577, 4096])
def test_gpu_runs_the_kernel_through_the_operator(gpu, tokens, dtype):
    r, exact = (tokens - 1) // 2, lattice(3, 2, tokens, 16).to(DTYPES[dtype])
    assert_equal(ops.match(exact.to(gpu), r, 1, True), exact, r, 1, True)
    for edit in (one_nan, overflow, some_zeros) if tokens == 197 else ():
        strange = lattice(3, 2, tokens, 16).to(DTYPES[dtype])
        edit(strange)
        assert_equal(ops.match(strange.to(gpu), r, 1, True), strange, r, 1, True)
    keys = transposed_qkv(normal(3, 2, tokens, 64).to(DTYPES[dtype]))
    assert_within_rounding(ops.match(keys.to(gpu), r, 1, True), keys, r, 1, True)
    with torch_ops.eager():
        assert_within_rounding(ops.match(keys.to(gpu), r, 1, True), keys, r, 1, True)
