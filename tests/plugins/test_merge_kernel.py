"""TomeMerge under the Triton interpreter, and on a GPU if there is one, against the reference."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from merge_cases import DTYPES, assert_as_good_as_eager, exact, normal, random_plan, sizes
from pairwise import pairwise

from tome_export.merge import ops
from tome_export.merge.plan import MergePlan
from tome_export.plugins import torch_ops
from tome_export.plugins.merge import contract


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 48, 192, 768, 1152])
def test_widths(interpreter, width, dtype):
    x, size, plan = normal(2, 21, width).to(DTYPES[dtype]), sizes(2, 21), random_plan(2, 21, 9)
    assert_as_good_as_eager(interpreter("merge", x, size, *plan), x, size, plan)


@pairwise("counts, batch, dtype", ((2, 1), (3, 1), (4, 0), (5, 2), (50, 24)), (1, 2), DTYPES)
def test_tokens(interpreter, counts, batch, dtype):
    tokens, r = counts
    x = normal(batch, tokens, 24, seed=tokens).to(DTYPES[dtype])
    size, plan = sizes(batch, tokens), random_plan(batch, tokens, r)
    assert_as_good_as_eager(interpreter("merge", x, size, *plan), x, size, plan)


@pytest.mark.parametrize("r", [128, 129, 288])
def test_more_folded_tokens_than_one_block(interpreter, r):
    x, size, plan = normal(1, 300, 16), sizes(1, 300), random_plan(1, 300, r)
    assert_as_good_as_eager(interpreter("merge", x, size, *plan), x, size, plan)


@pytest.mark.parametrize("place", [0, 7, 11])
def test_all_fold_into_one(interpreter, place):
    keep, src, dst = random_plan(2, 152, 140)
    plan = keep, src, torch.full_like(dst, place)
    x, size = normal(2, 152, 24).half(), sizes(2, 152)
    assert_as_good_as_eager(interpreter("merge", x, size, *plan), x, size, plan)


def test_plans_of_the_matching_kernel(interpreter):
    x, size, keys = normal(2, 50, 32), sizes(2, 50), normal(2, 2, 50, 16, seed=1)
    plan = interpreter("match", keys, 20, 1, True)
    assert_as_good_as_eager(interpreter("merge", x, size, *plan), x, size, plan)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_merge_only_reorders(interpreter, dtype):
    x, size, plan = normal(2, 9, 24).to(DTYPES[dtype]), torch.ones(2, 9), random_plan(2, 9, 0)
    merged, total = interpreter("merge", x, size, *plan)
    assert torch.equal(merged, x.gather(1, plan[0].long()[..., None].expand(-1, -1, 24)))
    assert torch.equal(total, torch.ones(2, 9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_duplicates_merge_into_themselves(interpreter, dtype):
    x = normal(1, 1, 24).expand(2, 50, 24).to(DTYPES[dtype])
    merged, total = interpreter("merge", x, torch.full((2, 50), 4.0), *random_plan(2, 50, 20))
    # Sums of equal numbers times powers of two, and their mean: at most a unit in fp32.
    assert (merged - x[:, :30]).abs().max() <= torch.finfo(DTYPES[dtype]).eps * x.abs().max()
    assert (total.sum(1) == 200).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again_and_in_any_batch(interpreter, dtype):
    x, size, plan = normal(3, 20, 48).to(DTYPES[dtype]), sizes(3, 20), random_plan(3, 20, 24)
    first, again = (interpreter("merge", x, size, *plan) for _ in range(2))
    alone = interpreter("merge", x[1:2], size[1:2], *(part[1:2] for part in plan))
    for index in range(2):
        assert torch.equal(first[index], again[index])
        assert torch.equal(first[index][1:2], alone[index])


def test_sums_are_fp32(interpreter):
    """In fp16 the sum of these would be infinite, and 2048 + 1 would be 2048."""
    x = torch.full((1, 8, 8), 60_000.0).half()
    merged, _ = interpreter("merge", x, torch.ones(1, 8), *random_plan(1, 8, 6))
    assert (merged == x[:, :2]).all()
    keep, src, dst = (torch.tensor([part], dtype=torch.int32) for part in ([0], [1], [0]))
    size = torch.tensor([[2048.0, 1.0]])
    x = torch.tensor([[[1.0], [2050.0]]]).half()
    merged, total = interpreter("merge", x, size, keep, src, dst)
    assert total.item() == 2049.0
    assert merged.item() == 2.0


def test_non_contiguous_inputs(interpreter):
    wide, plan = normal(2, 24, 21), random_plan(2, 21, 9)
    x, size = wide.transpose(1, 2), sizes(2, 42)[:, ::2]
    strided = tuple(part.repeat_interleave(2, 1)[:, ::2] for part in plan)
    result = interpreter("merge", x, size, *strided)
    assert_as_good_as_eager(result, x, size, plan)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_strange_numbers_stay_in_their_group(interpreter, value):
    x, size, (keep, src, dst) = normal(1, 20, 16), sizes(1, 20), random_plan(1, 20, 8)
    clean, _ = interpreter("merge", x, size, keep, src, dst)
    x[0, src[0, 3], 5] = value
    merged, _ = interpreter("merge", x, size, keep, src, dst)
    place = dst[0, 3].item()
    assert torch.equal(merged[0, place, 5], torch.tensor(value)) or np.isnan(value)
    assert not merged[0, place, 5].isfinite()
    merged[0, place, 5] = clean[0, place, 5]
    assert torch.equal(merged, clean)


OUTSIDE = [-1, -(2**31), 20, 21, 500, 2**31 - 1]


@pytest.mark.parametrize("index", OUTSIDE)
def test_a_folded_token_outside_reads_as_nothing(interpreter, index):
    """NaN lies before and behind x and size: any of it that was read would show."""
    x, size, (keep, src, dst) = normal(2, 20, 24), sizes(2, 20), random_plan(2, 20, 8)
    src[0, 2] = index
    merged, total, untouched = interpreter("merge_guarded", x, size, keep, src, dst)
    assert untouched
    kept = [[j for j in range(8) if (image, j) != (0, 2)] for image in range(2)]
    for image in range(2):
        plan = keep[image : image + 1], *(part[image, kept[image]][None] for part in (src, dst))
        alone = x[image : image + 1], size[image : image + 1]
        expected, expected_total = exact(*alone, plan)
        assert torch.equal(total[image : image + 1].double(), expected_total)
        assert (merged[image : image + 1] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("index", [-1, -(2**31), 12, 13, 500, 2**31 - 1])
def test_a_destination_outside_drops_the_token(interpreter, index):
    x, size, (keep, src, dst) = normal(2, 20, 24), sizes(2, 20), random_plan(2, 20, 8)
    dst[1, 5] = index
    merged, total, untouched = interpreter("merge_guarded", x, size, keep, src, dst)
    assert untouched
    others = [0, 1, 2, 3, 4, 6, 7]
    expected, expected_total = exact(x[1:], size[1:], (keep[1:], src[1:, others], dst[1:, others]))
    assert torch.equal(total[1:].double(), expected_total)
    assert (merged[1:] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("index", OUTSIDE)
def test_a_kept_token_outside_reads_as_nothing(interpreter, index):
    x, size, (keep, src, dst) = normal(1, 20, 24), sizes(1, 20), random_plan(1, 20, 8)
    dst[0, :2], dst[0, 2:] = 3, 5
    keep[0, 3] = keep[0, 4] = index
    merged, total, untouched = interpreter("merge_guarded", x, size, keep, src, dst)
    assert untouched
    assert total[0, 3] == size[0, src[0, 0]] + size[0, src[0, 1]]
    assert merged[0, 3].isfinite().all()
    # Nothing kept and nothing folded into it: a mean of no tokens.
    assert total[0, 4] == 0
    assert merged[0, 4].isnan().all()
    others = [place for place in range(12) if place != 4]
    assert merged[0, others].isfinite().all()


def test_no_image_and_no_token(interpreter):
    empty = torch.zeros(0, 4, dtype=torch.int32)
    merged, total = interpreter("merge", torch.ones(0, 8, 16), torch.ones(0, 8), *[empty] * 3)
    assert merged.shape == (0, 4, 16)
    assert total.shape == (0, 4)


REFUSED = {
    "float64": (
        torch.float64,
        8,
        "tokens are float64; the TomeMerge kernel takes float32, float16, bfloat16",
    ),
    "width": (
        torch.float32,
        contract.MAX_WIDTH + 1,
        "tokens are 8193 wide; the TomeMerge kernel takes at most 8192",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernel_cannot_take_is_refused(case):
    dtype, width, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        torch_ops.merge(torch.zeros(1, 4, width, dtype=dtype), sizes(1, 4), *random_plan(1, 4, 1))


def test_the_widest_token(interpreter):
    x, size, plan = normal(1, 4, contract.MAX_WIDTH), sizes(1, 4), random_plan(1, 4, 2)
    assert_as_good_as_eager(interpreter("merge", x, size, *plan), x, size, plan)


@pytest.fixture(scope="module")
def dispatched(interpreter):
    return interpreter("dispatched")


@pytest.mark.parametrize(
    ("case", "runs"),
    {
        "match float32": "kernel",
        "match a metric": "kernel",
        "match float64": "eager",
        "match wide heads": "eager",
        "merge float32": "kernel",
        "merge float64": "eager",
        "merge float64 size": "eager",
        "merge wide tokens": "eager",
        "match in eager()": "eager",
        "merge in eager()": "eager",
        "match after an inner eager()": "eager",
        "match after eager()": "kernel",
        "merge after eager() failed": "kernel",
    }.items(),
)
def test_what_the_operators_run_on_cuda(dispatched, case, runs):
    assert dispatched[case] == runs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "r"), [(50, 0), (197, 16), (577, 288)])
def test_gpu_runs_the_kernel_through_the_operator(gpu, tokens, r, dtype):
    x, size = normal(3, tokens, 192).to(DTYPES[dtype]), sizes(3, tokens)
    plan = random_plan(3, tokens, r)
    on_gpu = x.to(gpu), size.to(gpu), MergePlan(*(part.to(gpu) for part in plan))
    first, again = ops.merge(*on_gpu), ops.merge(*on_gpu)
    assert_as_good_as_eager(first, x, size, plan)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with torch_ops.eager():
        assert_as_good_as_eager(ops.merge(*on_gpu), x, size, plan)
