"""A model beside the one it is compared with, on one backend and at one batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tome_export.bench.timing import Seconds, paired, percentiles
from tome_export.runtime.runner import Runner
from tome_export.spec import INPUT_NAME

MERGED, AGAINST = "merged", "against"


@dataclass(frozen=True)
class Comparison:
    """Two models timed in turn.

    Attributes:
        batch: Images per run.
        seconds: Per run, ``[rounds]``, by ``merged`` and ``against``; entry i of both is of the
            same round.
        macs_ratio: MACs of the other over those of the merged one: the speed-up if merging cost
            nothing and time went with MACs.
    """

    batch: int
    seconds: Mapping[str, Seconds]
    macs_ratio: float

    @property
    def speedup(self) -> dict[str, float]:
        """p20, p50 and p80 of the ratio within each round."""
        return percentiles(self.seconds[AGAINST] / self.seconds[MERGED])

    def to_dict(self) -> dict[str, Any]:
        """Latencies, throughput, speed-up and its share of the MACs limit, ready for JSON."""
        speedup = self.speedup
        return {
            "batch": self.batch,
            **{name: self._one(name) for name in (MERGED, AGAINST)},
            "speedup": speedup,
            "share_of_macs_limit": speedup["p50"] / self.macs_ratio,
        }

    def _one(self, name: str) -> dict[str, Any]:
        latency_ms = percentiles(1e3 * self.seconds[name])
        return {"latency_ms": latency_ms, "throughput": 1e3 * self.batch / latency_ms["p50"]}


def compare(
    runners: Mapping[str, Runner],
    images: np.ndarray[Any, Any],
    macs_ratio: float,
    rounds: int,
    warmup: int,
    on_round: Callable[[int], None],
) -> Comparison:
    """Time two models in turn on the same images.

    Args:
        runners: By ``merged`` and ``against``.
        images: ``pixel_values [B, C, H, W]`` float32.
        macs_ratio: See ``Comparison``.
        rounds: Timed runs of each.
        warmup: Untimed runs of each, first.
        on_round: Told how many rounds are done.
    """
    seconds = times(runners, images, rounds, warmup, on_round)
    return Comparison(len(images), seconds, macs_ratio)


def times(
    runners: Mapping[str, Runner],
    images: np.ndarray[Any, Any],
    rounds: int,
    warmup: int,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Seconds]:
    """Seconds per run, ``[rounds]``, of runners timed in turn; see ``compare``."""
    runs = {
        name: lambda runner=runner: runner.infer({INPUT_NAME: images})
        for name, runner in runners.items()
    }
    return paired(runs, rounds, warmup, on_round=on_round)
