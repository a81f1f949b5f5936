"""The verdicts of the GPU benchmark: what passes, and that wrong results do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.gpu import merge_cases
from benchmarks.gpu.merge_cases import MergeCase
from tome_export.merge import ops, reference
from tome_export.merge.plan import MergePlan

CONTENTS = ("normal", "duplicates", "one-hot", "not finite", "huge")


@pytest.mark.parametrize("heads", [0, 1, 6])
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("tokens", [50, 101, 198])
def test_torchs_own_plans_pass(gpu_bench, tokens, content, heads):
    oracle = gpu_bench("oracle")
    order = {"prefix": 0, "class_token": False} if tokens == 50 else {}
    case = oracle.Keys(3, heads, tokens, 64, 20, dtype="float32", content=content, **order)
    keys = oracle.make_keys(case)
    plan = ops.match(keys, case.r, case.prefix, case.class_token)
    found = oracle.judge_match(case, keys, plan)
    assert found["passed"], found
    assert found["defects"] == 0
    assert found["decisions"] == 3 * ((tokens + 1) // 2 - (case.prefix + 1) // 2)
    if content == "one-hot":
        assert found["identical_plans"] == 3


@pytest.mark.parametrize("content", CONTENTS)
def test_both_oracles_agree(gpu_bench, monkeypatch, content):
    oracle = gpu_bench("oracle")
    case = oracle.Keys(2, 4, 51, 8, 12, dtype="float32", content=content)
    exact = oracle.make_keys(case).double()
    loops = oracle._oracle(case, exact)
    monkeypatch.setattr(oracle, "REFERENCE_TOKENS", 0)
    for slow, fast in zip(loops, oracle._oracle(case, exact), strict=True):
        if content == "duplicates":  # equal scores may differ in their last bits
            continue
        assert all(
            np.array_equal(getattr(slow, part), getattr(fast, part))
            for part in ("keep", "src", "dst")
        )
    assert len(loops) == 2


def test_wrong_plans_are_defects(gpu_bench):
    oracle = gpu_bench("oracle")
    case = oracle.Keys(2, 4, 101, 16, 20, dtype="float32")
    keys = oracle.make_keys(case)
    keep, src, dst = ops.match(keys, case.r, case.prefix, case.class_token)
    other = ops.match(oracle.make_keys(case, seed=1), case.r, case.prefix, case.class_token)
    assert oracle.judge_match(case, keys, (keep, src, dst))["passed"]
    # Another input's plan is sound, but nothing of it is explained by rounding.
    found = oracle.judge_match(case, keys, other)
    assert not found["passed"]
    assert found["defects"] > 20
    # One token twice: no plan at all.
    broken = keep.clone()
    broken[0, 5] = broken[0, 6]
    found = oracle.judge_match(case, keys, (broken, src, dst))
    assert found["defects"] == 1
    assert found["largest_margin"] == np.inf


def test_a_tie_decided_the_other_way_fails(gpu_bench):
    oracle = gpu_bench("oracle")
    case = oracle.Keys(1, 1, 50, 16, 10, content="one-hot")
    keys = oracle.make_keys(case)
    rows = keys[0, 0].double().tolist()
    plan = reference.match(rows, case.r, case.prefix, case.class_token)
    keep, src, dst = (torch.tensor([part]) for part in (plan.keep, plan.src, plan.dst))
    assert oracle.judge_match(case, keys, (keep, src, dst))["passed"]
    turned = oracle.judge_match(case, keys, (keep, src.flip(1), dst.flip(1)))
    assert turned["defects"] == 0  # the margin is zero: rounding would explain it
    assert not turned["passed"]


def test_merges_are_measured_against_torchs_error(gpu_bench):
    oracle = gpu_bench("oracle")
    inputs = merge_cases.make_inputs(MergeCase(2, 51, 32, 9), torch.Generator().manual_seed(0))
    x, size, *plan = inputs
    exact, sizes = ops.merge(x.double(), size, MergePlan(*plan))
    eager = ops.merge(x, size, MergePlan(*plan))
    found = oracle.judge_merge(inputs, eager, eager)
    assert found["passed"]
    assert found["error_over_eager"] == 1.0
    error = found["eager_error"]
    for factor, passed in ((1.9, True), (2.1, False)):
        off = exact.clone()
        off[0, 0, 0] += factor * error
        found = oracle.judge_merge(inputs, (off, sizes), eager)
        assert found["passed"] == passed
        assert found["error_over_eager"] == pytest.approx(factor, rel=1e-3)
    wrong = sizes.clone()
    wrong[1, 3] += 1
    found = oracle.judge_merge(inputs, (eager[0], wrong), eager)
    assert found["wrong_sizes"] == 1
    assert not found["passed"]
    missing = eager[0].clone()
    missing[0, 0] = torch.nan
    assert not oracle.judge_merge(inputs, (missing, sizes), eager)["passed"]
