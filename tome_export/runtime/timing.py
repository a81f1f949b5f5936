"""Several things timed in turn, so that a drift of the machine's speed meets them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tome_export.artifact.bench import BenchRow, Quantiles, Timed
from tome_export.runtime.runner import Runner
from tome_export.spec import INPUT_NAME

Seconds = np.ndarray[Any, Any]

MERGED, AGAINST = "merged", "against"


def paired(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Seconds]:
    """Time several things once per round; every other round goes through them backwards.

    Args:
        runs: What to call, by name.
        rounds: How many calls of each are timed, at least 1.
        warmup: How many calls of each come first, untimed.
        clock: Gives seconds.
        on_round: Told how many rounds are done.

    Returns:
        Seconds by name, ``[rounds]``; entry i of each was measured in the same round.
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


def times(
    runners: Mapping[str, Runner],
    images: np.ndarray[Any, Any],
    rounds: int,
    warmup: int,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Seconds]:
    """Time models in turn on the same images.

    Args:
        runners: By name.
        images: ``pixel_values [B, C, H, W]`` float32.
        rounds: Timed runs of each.
        warmup: Untimed runs of each, first.
        on_round: Told how many rounds are done.

    Returns:
        See ``paired``.
    """
    runs = {
        name: lambda runner=runner: runner.infer({INPUT_NAME: images})
        for name, runner in runners.items()
    }
    return paired(runs, rounds, warmup, on_round=on_round)


def row_from_seconds(
    backend: str, batch: int, seconds: Mapping[str, Seconds], macs_ratio: float
) -> BenchRow:
    """A line of ``bench.json``, without the memory.

    Args:
        backend: Where the models ran.
        batch: Images per run.
        seconds: Per run, ``[rounds]``, by ``merged`` and ``against``; entry i of both is of the
            same round.
        macs_ratio: MACs of the other over those of the merged one: the speed-up if merging cost
            nothing and time went with MACs.
    """
    speedup = Quantiles(**percentiles(seconds[AGAINST] / seconds[MERGED]))
    latency_ms = {name: Quantiles(**percentiles(1e3 * seconds[name])) for name in (MERGED, AGAINST)}
    timed = {
        name: Timed(latency_ms=found, throughput=1e3 * batch / found.p50)
        for name, found in latency_ms.items()
    }
    return BenchRow(
        backend=backend,
        batch=batch,
        merged=timed[MERGED],
        against=timed[AGAINST],
        speedup=speedup,
        share_of_macs_limit=speedup.p50 / macs_ratio,
    )
