"""Several things timed in turn, so that a drift of the machine's speed meets them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Seconds = np.ndarray[Any, Any]


def paired(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Seconds]:
    """Seconds ``[rounds]`` of several things by name, each timed once per round.

    Every other round goes through them backwards.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    order = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        for name in order if index % 2 == 0 else reversed(order):
            start = clock()
            runs[name]()
            seconds[name].append(clock() - start)
        on_round(index + 1)
    return {name: np.array(values) for name, values in seconds.items()}


def percentiles(values: Seconds) -> dict[str, float]:
    """p20, p50 and p80."""
    return {f"p{p}": float(np.percentile(values, p)) for p in (20, 50, 80)}
