"""Match and merge against the slow reference: every case of prefix, parity, r, size and dtype."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tome_export.merge import reference
from tome_export.merge.lowering import mean_keys, merge_index_add, merge_matmul
from tome_export.merge.ops import match, merge
from tome_export.merge.plan import MergePlan
from tome_export.merge.spec import clamp_r

LOWERINGS = {"index_add": merge_index_add, "matmul": merge_matmul, "op": merge}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# prefix, class_token: none, class, class + distill, registers only, class + 4 registers.
PREFIXES = [(0, False), (1, True), (2, True), (1, False), (4, False), (5, True)]
TOKENS = [9, 16, 17, 24]
R = [1, 3, 1000]


def signs(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Vectors of +-1: with 16 entries every norm, score and tie is exact in every dtype."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.choice([-1.0, 1.0], size=shape).astype(np.float32))


def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(shape))


def assert_plan_is_references(keys, r, prefix, class_token):
    """Of keys ``[B, H, N, D]`` or a metric ``[B, N, D]``."""
    plan = match(keys, r, prefix, class_token)
    assert {part.dtype for part in plan} == {torch.int32}
    for image in range(len(keys)):
        rows = keys[image].double().tolist()
        if keys.ndim == 4:
            rows = reference.mean_keys(rows)
        expected = reference.match(rows, r, prefix, class_token)
        assert plan.keep[image].tolist() == expected.keep
        assert plan.src[image].tolist() == expected.src
        assert plan.dst[image].tolist() == expected.dst


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prefix", "class_token"), PREFIXES)
def test_match_with_exact_ties(prefix, class_token, dtype):
    for tokens, wanted, batch in itertools.product(TOKENS, R, (1, 3)):
        r = clamp_r(tokens, wanted, prefix)
        metric = signs((batch, tokens, 16), seed=tokens * 31 + wanted)
        metric[:, tokens // 2 :] = metric[:, : tokens - tokens // 2].clone()
        assert_plan_is_references(metric.to(dtype), r, prefix, class_token)


@pytest.mark.parametrize(("prefix", "class_token"), PREFIXES)
def test_match_of_random_tokens(prefix, class_token):
    for tokens, wanted in itertools.product(TOKENS, R):
        metric = normal((2, tokens, 12), seed=tokens + wanted)
        assert_plan_is_references(metric, clamp_r(tokens, wanted, prefix), prefix, class_token)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_match_of_keys_averages_them_over_heads(heads, dtype):
    """Heads of +-1 that differ by a factor alone: mean, norm, scores and ties are exact."""
    weights = torch.tensor([1.0, -2.0, 4.0, 8.0])[:heads, None, None]
    for (prefix, class_token), tokens in itertools.product(PREFIXES, (9, 16, 50)):
        keys = (signs((2, 1, tokens, 16), seed=tokens + heads) * weights).to(dtype)
        keys[:, :, tokens // 2 :] = keys[:, :, : tokens - tokens // 2].clone()
        rows = torch.tensor([reference.mean_keys(image.tolist()) for image in keys])
        assert torch.equal(mean_keys(keys).float(), rows)
        assert_plan_is_references(keys, clamp_r(tokens, 6, prefix), prefix, class_token)


def test_match_of_random_keys():
    for (prefix, class_token), tokens, heads in itertools.product(PREFIXES, TOKENS, (1, 3, 12)):
        keys = normal((2, heads, tokens, 8), seed=tokens + heads)
        assert_plan_is_references(keys, clamp_r(tokens, 4, prefix), prefix, class_token)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_metric_is_keys_of_one_head_and_layout_does_not_matter(dtype):
    keys = normal((2, 3, 20, 8), seed=3).to(dtype)
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    one = keys[:, :1]
    for ours, theirs in ((one, one[:, 0]), (keys, strided)):
        for a, b in zip(match(ours, 4, 1, True), match(theirs, 4, 1, True), strict=True):
            assert torch.equal(a, b)


def test_mean_over_heads_is_fp32_for_half_keys():
    """In fp16 the sum of 65504 twice is infinite, and 2048 + 1 is 2048."""
    keys = torch.tensor([[[[65504.0]], [[65504.0]]], [[[2048.0]], [[1.0]]]]).half()
    assert mean_keys(keys).flatten().tolist() == [65504.0, 1024.5]
    assert {mean_keys(keys.to(d)).dtype for d in (torch.float16, torch.bfloat16)} == {torch.float32}
    assert mean_keys(keys.double()).dtype == torch.float64


@pytest.mark.parametrize("shape", [(12, 4), (1, 1, 1, 12, 4)])
def test_match_refuses_other_ranks(shape):
    with pytest.raises(ValueError, match=r"expected \[B, H, N, D\], or \[B, N, D\] for a metric"):
        match(torch.ones(shape), 1, 0, False)


# The square of the last two overflows fp32; fp16 cannot hold them, so they are infinite there.
BAD = [float("nan"), float("inf"), -float("inf"), 2.0**64, 1e30]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prefix", "class_token"), PREFIXES)
def test_tokens_that_are_not_finite_score_zero(prefix, class_token, dtype, bad):
    """Wherever they stand: in A, in B, in the prefix, all of A, all of B, everywhere."""
    tokens = 17
    spots = [[8], [9], [0], [8, 9, 12], range(0, tokens, 2), range(1, tokens, 2), range(tokens)]
    for spot, r in itertools.product(spots, (1, 1000)):
        keys = signs((2, 2, tokens, 16), seed=5)
        keys[:, 1] = keys[:, 0]
        keys[0, :, list(spot), 3] = bad
        assert_plan_is_references(keys.to(dtype), clamp_r(tokens, r, prefix), prefix, class_token)


def test_infinite_keys_of_either_sign_are_no_direction():
    keys = torch.ones(1, 2, 6, 4)
    keys[0, 0, 2], keys[0, 1, 2] = torch.inf, -torch.inf
    assert_plan_is_references(keys, 2, 0, False)
    assert match(keys, 2, 0, False).src.tolist() == [[0, 4]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("length", "dst"), [(1.8e19, 2), (1.9e19, 1)])
def test_longest_vector_with_a_direction(length, dst, dtype):
    """2^64 is 1.84e19; token 0 has the direction of token 3, if that has one."""
    metric = torch.tensor([[[1.0, 0], [0, 1], [0, -1], [length, 0]]], dtype=dtype)
    assert_plan_is_references(metric, 1, 0, False)
    plan = match(metric, 1, 0, False)
    assert (plan.src.tolist(), plan.dst.tolist()) == ([[0]], [[dst]])


@pytest.mark.parametrize("class_token", [False, True])
def test_equal_tokens_merge_lowest_index_first(class_token):
    plan = match(torch.ones(1, 12, 4), 3, 1, class_token)
    # All scores are 1: the first three of set A merge into the first token of set B.
    assert plan.src.tolist() == [[2, 4, 6]]
    assert plan.keep.tolist() == [[0, 8, 10, 1, 3, 5, 7, 9, 11]]
    assert plan.dst.tolist() == [[3, 3, 3]]


def test_zero_vectors_score_zero():
    metric = torch.zeros(1, 6, 4)
    metric[0, 2], metric[0, 3] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([-1.0, 0, 0, 0])
    # Token 2 has scores 0, -1, 0; the zero tokens 0 and 4 have 0 everywhere: all ties.
    assert_plan_is_references(metric, 2, 0, False)
    assert match(metric, 2, 0, False).src.tolist() == [[0, 2]]


def test_norm_bound_is_per_vector():
    """A vector shorter than the bound keeps its direction but scores less, as the spec says."""
    metric = torch.tensor([[[1e-13, 0], [1, 0], [0.6, 0.8], [0, 1e-13]]], dtype=torch.float64)
    # Token 0 scores 0.1 with token 1; token 2 scores 0.6.
    assert reference.cosine_scores(metric[0].tolist(), 0)[0, 1] == pytest.approx(0.1)
    assert_plan_is_references(metric, 1, 0, False)
    assert match(metric, 1, 0, False).src.tolist() == [[2]]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_match_ignores_length(scale):
    metric = normal((2, 20, 8), seed=1).float()
    lengths = torch.linspace(0.5, 2.0, 20)[:, None]
    for a, b in zip(
        match(metric, 6, 1, True), match(metric * lengths * scale, 6, 1, True), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("r", [0, -1, 9])
def test_match_refuses_r_outside_the_clamp(r):
    with pytest.raises(ValueError, match=f"r is {r}; expected 1 to 8 for 17 tokens"):
        match(torch.ones(1, 17, 4), r, 1, True)


def plan_with_groups(tokens: int, r: int, prefix: int, batch: int, seed: int) -> MergePlan:
    """Few distinct destinations, so that several tokens fold into one."""
    metric = signs((batch, tokens, 16), seed)
    metric[:, 1::2] = metric[:, 1:2]
    return match(metric, r, prefix, True)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_is_the_size_weighted_mean(lowering, dtype):
    for (prefix, class_token), tokens, batch in itertools.product(PREFIXES, TOKENS, (1, 3)):
        r = clamp_r(tokens, 5, prefix)
        metric = normal((batch, tokens, 8), seed=tokens)
        x = normal((batch, tokens, 6), seed=tokens + 1).to(dtype)
        rng = np.random.default_rng(tokens)
        size = torch.from_numpy(rng.integers(1, 40, size=(batch, tokens))).float()
        plan = match(metric, r, prefix, class_token)
        merged, sizes = LOWERINGS[lowering](x, size, plan)
        assert (merged.dtype, sizes.dtype) == (dtype, torch.float32)
        for image in range(batch):
            parts = [part[image].tolist() for part in plan]
            rows, expected = reference.merge(
                x[image].double().tolist(), size[image].tolist(), reference.ReferencePlan(*parts)
            )
            assert sizes[image].tolist() == expected
            exact = torch.tensor(rows, dtype=torch.float64)
            # Sums are fp32 (fp64 for fp64), so all that half precision adds is one rounding.
            unit = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 0.0)
            error = (merged[image].double() - exact).abs()
            rounding = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 if unit == 0.0 else unit
            assert (error <= rounding * 1.01).all()


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_merge_sums_are_fp32(lowering):
    """2048 + 1 is 2048 in fp16: sums in half precision would lose every small token."""
    plan = plan_with_groups(18, 8, 0, 1, seed=0)
    x = torch.ones(1, 18, 1, dtype=torch.float16)
    x[0, 1] = 3.0
    size = torch.ones(1, 18)
    size[0, 1] = 4096.0
    merged, sizes = LOWERINGS[lowering](x, size, plan)
    target = plan.keep[0].tolist().index(1)
    assert plan.dst[0].tolist() == [target] * 8
    assert sizes[0, target] == 4104.0
    assert merged[0, target, 0] == torch.tensor((3 * 4096 + 8) / 4104).half()


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_merge_of_nothing_is_the_identity(lowering):
    x, size = normal((2, 7, 3), seed=0).float(), torch.full((2, 7), 3.0)
    keep = torch.arange(7, dtype=torch.int32).expand(2, 7)
    empty = torch.zeros(2, 0, dtype=torch.int32)
    merged, sizes = LOWERINGS[lowering](x, size, MergePlan(keep, empty, empty))
    torch.testing.assert_close(merged, x, rtol=1e-6, atol=0)
    assert torch.equal(sizes, size)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_duplicate_destinations_all_count(lowering):
    plan = plan_with_groups(12, 4, 0, 2, seed=3)
    assert all(len(set(row)) == 1 for row in plan.dst.tolist())
    x = torch.arange(24.0).reshape(2, 12, 1)
    size = torch.arange(1.0, 25.0).reshape(2, 12)
    merged, sizes = LOWERINGS[lowering](x, size, plan)
    for image in range(2):
        group = [*plan.src[image].tolist(), 1]
        weight = size[image, group]
        target = plan.dst[image, 0]
        assert sizes[image, target] == weight.sum()
        mean = (x[image, group, 0] * weight).sum() / weight.sum()
        torch.testing.assert_close(merged[image, target, 0], mean)
