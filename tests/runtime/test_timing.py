"""Pairing and percentiles, on a clock that is given."""

from __future__ import annotations

import numpy as np
import pytest

from tome_export.runtime.timing import paired, percentiles


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
