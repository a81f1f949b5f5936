"""Sequences of 8,192 tokens, and that the orders which are timed are all the right one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tome_export.merge import reference
from tome_export.merge.ops import match


@pytest.fixture
def long(bench):
    return bench("long_sequences")


@pytest.mark.parametrize(("class_token", "lowering"), [(True, "matmul"), (False, "index_add")])
def test_8192_tokens_through_onnxruntime(long, class_token, lowering):
    found = long.run_onnxruntime(8192, 600, class_token, lowering)
    assert found["same_plan"]
    assert found["same_sizes"]
    assert found["largest_error"] < 1e-6


@pytest.mark.parametrize("class_token", [True, False])
def test_the_oracle_is_the_references(long, class_token):
    metric = long.exact_metric(41)
    ours = long.exact_plan(metric[0], 7, 1, class_token)
    slow = reference.match(metric[0].tolist(), 7, 1, class_token)
    fast = match(torch.from_numpy(metric), 7, 1, class_token)
    for found, wanted, torchs in zip(ours, (slow.keep, slow.src, slow.dst), fast, strict=True):
        assert found.tolist() == wanted == torchs[0].tolist()
    x, size = np.random.default_rng(0).standard_normal((41, 3)), np.arange(1.0, 42.0)
    rows, sizes = reference.merge(x.tolist(), size.tolist(), slow)
    merged, merged_size = long.exact_merge(x, size, ours)
    np.testing.assert_allclose(merged, rows, rtol=1e-12)
    np.testing.assert_array_equal(merged_size, sizes)


def test_all_orders_give_one_plan(long):
    for class_token in (True, False):
        row = long.measure_orders(33, 5, class_token, rounds=1)
        assert row["over_two_sorts"]["two sorts"]["p50"] == 1.0
        assert len(row["cpu_ms"]) == (3 if class_token else 2)
