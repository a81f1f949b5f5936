"""Pairing and percentiles, on a clock that is given."""

from __future__ import annotations

import numpy as np
import pytest

from tome_export.artifact.bench import Quantiles
from tome_export.runtime.timing import paired, percentiles, row_from_seconds


def test_rounds_alternate_their_order():
    now, called, told = [0.0], [], []

    def run(name, seconds):
        called.append(name)
        now[0] += seconds

    runs = {"a": lambda: run("a", 1.0), "b": lambda: run("b", 2.0)}
    seconds = paired(runs, 3, warmup=1, clock=lambda: now[0], on_round=told.append)
    assert "".join(called) == "ab" + "ab" + "ba" + "ab"
    assert seconds["a"].tolist() == [1.0] * 3
    assert seconds["b"].tolist() == [2.0] * 3
    assert told == [1, 2, 3]


def test_a_drift_leaves_the_ratio_alone():
    """Both slow down from round to round; the ratio within each round does not."""
    seconds = {"merged": np.array([1.0, 2.0, 4.0]), "against": np.array([1.5, 3.0, 6.0])}
    row = row_from_seconds("ort-cpu", 4, seconds, macs_ratio=2.0)
    assert row.speedup == Quantiles(p20=1.5, p50=1.5, p80=1.5)
    assert row.share_of_macs_limit == 0.75
    assert row.merged.latency_ms.p50 == 2000.0
    assert row.merged.throughput == 2.0
    assert (row.backend, row.batch) == ("ort-cpu", 4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (range(101), {"p20": 20.0, "p50": 50.0, "p80": 80.0}),
        ([3.0], {"p20": 3.0, "p50": 3.0, "p80": 3.0}),
        ([5.0, 1.0], {"p20": 1.8, "p50": 3.0, "p80": 4.2}),
    ],
)
def test_percentiles(values, expected):
    assert percentiles(np.array(values)) == pytest.approx(expected)
