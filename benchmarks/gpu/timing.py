"""Times on the GPU: CUDA-graph replays between events, with inputs that are not in the cache.

On a CPU, where parts are tried out, the same calls are timed by the clock.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.harness import paired

Array = np.ndarray[Any, Any]
GRAPH_BYTES = 4e9
"""Bytes that the calls of one graph move: a millisecond on the fastest GPUs of 2025."""
MAX_CALLS = 512


@dataclass(frozen=True)
class Rotation:
    """How often an operation is called in one graph, and on how many sets of inputs in turn."""

    calls: int
    sets: int


def rotation(moved_bytes: int, set_bytes: int, l2_bytes: int, free_bytes: int) -> Rotation:
    """Enough sets that a set has left the L2 cache when its turn comes again, if that can be.

    Args:
        moved_bytes: Bytes that one call must move.
        set_bytes: Memory that one set of inputs occupies.
        l2_bytes: Size of the cache.
        free_bytes: Memory that may be used for the sets.
    """
    wanted = math.ceil(1.5 * l2_bytes / moved_bytes)
    sets = max(1, min(wanted, MAX_CALLS, free_bytes // set_bytes))
    calls = min(MAX_CALLS, math.ceil(min(GRAPH_BYTES, free_bytes) / moved_bytes))
    # Whole rounds, so that every set is used equally often.
    return Rotation(sets * max(1, calls // sets), sets)


def l2_bytes(device: str = "cuda") -> int:
    """The L2 cache of the GPU; 64 MiB where torch does not say, or there is none."""
    if device == "cpu":
        return 64 << 20
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20)


def free_bytes(device: str = "cuda") -> int:
    """Memory that measurements may take for their inputs: a quarter of what is free."""
    if device == "cpu":
        return 64 << 20
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0]) // 4


def captured(run: Callable[..., object], inputs: Sequence[Any], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of ``calls`` calls of ``run``, one set of inputs after another.

    Results of as many calls as there are sets are alive at a time, so that a result is not written
    where the last one was and stays in the cache.

    Args:
        run: Called with a set's tensors; must not wait for the GPU.
        inputs: Tuples of tensors.
        calls: How often.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, loads, picks algorithms: none of it may be captured
            run(*inputs[0])
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    results: list[object] = [None] * len(inputs)
    with torch.cuda.graph(graph):
        for call in range(calls):
            results[call % len(inputs)] = run(*inputs[call % len(inputs)])
    return graph


def paired_replays(
    graphs: Mapping[str, tuple[torch.cuda.CUDAGraph, int]], budget_s: float, rounds: int = 50
) -> dict[str, Array]:
    """Replay graphs in turn, so that a drift of the GPU's clocks meets them all.

    Args:
        graphs: By name, with the calls in each.
        budget_s: GPU time to spend, about; at least five rounds are run.
        rounds: At most.

    Returns:
        Seconds per call by name, ``[rounds]``; entry i of each is of the same round.
    """

    def replay(count: int) -> dict[str, list[float]]:
        pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in graphs}
        for _ in range(count):
            for name, (graph, _) in graphs.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                begin.record()
                graph.replay()
                end.record()
                pairs[name].append((begin, end))
        torch.cuda.synchronize()
        return {
            name: [begin.elapsed_time(end) / 1e3 for begin, end in found]
            for name, found in pairs.items()
        }

    replay(1)
    once = sum(values[0] for values in replay(1).values())
    count = max(5, min(rounds, int(budget_s / max(once, 1e-9))))
    seconds = replay(count)
    return {name: np.array(values) / graphs[name][1] for name, values in seconds.items()}


def timed(
    runs: Mapping[str, Callable[..., object]],
    inputs: Sequence[Any],
    calls: int,
    budget_s: float = 0.2,
) -> dict[str, Array]:
    """Seconds per call of each, on the same inputs; see ``captured`` and ``paired_replays``."""
    if inputs[0][0].device.type == "cpu":
        sets = itertools.cycle(inputs)
        return paired({name: lambda run=run: run(*next(sets)) for name, run in runs.items()}, 5)  # type: ignore[misc]
    graphs = {name: (captured(run, inputs, calls), calls) for name, run in runs.items()}
    try:
        return paired_replays(graphs, budget_s)
    finally:
        for graph, _ in graphs.values():
            graph.reset()
        del graphs
        torch.cuda.empty_cache()


def medians_over(seconds: Mapping[str, Array], base: str) -> dict[str, float]:
    """How many times faster than ``base`` each of the others is: medians of the rounds' ratios."""
    return {
        name: float(np.median(seconds[base] / values))
        for name, values in seconds.items()
        if name != base
    }


def copy_bandwidth(device: str = "cuda") -> tuple[float, int]:
    """Bytes per second, read plus written, of a large copy on the GPU; and the bytes copied."""
    count = min(2 << 30, free_bytes(device) // 2)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timed({"copy": lambda a, b: b.copy_(a)}, [(source, target)], 4, 0.3)["copy"]
    return 2 * count / float(np.median(seconds)), count
