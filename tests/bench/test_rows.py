"""Rows of ``bench.json`` from what was timed."""

from __future__ import annotations

import numpy as np

from tome_export.artifact.bench import Quantiles
from tome_export.bench.main import row_from_seconds


def test_a_drift_leaves_the_ratio_alone():
    """Both slow down from round to round; the ratio within each round does not."""
    seconds = {"merged": np.array([1.0, 2.0, 4.0]), "against": np.array([1.5, 3.0, 6.0])}
    row = row_from_seconds("ort-cpu", 4, seconds, macs_ratio=2.0)
    assert row.speedup == Quantiles(p20=1.5, p50=1.5, p80=1.5)
    assert row.share_of_macs_limit == 0.75
    assert row.merged.latency_ms.p50 == 2000.0
    assert row.merged.throughput == 2.0
    assert (row.backend, row.batch) == ("ort-cpu", 4)
