"""How fast are match and merge, against PyTorch's operations and against the memory floor?

The floor is the time in which a plain copy on this GPU moves the bytes that the operation must
move. Calls are replayed in CUDA graphs and take several sets of inputs in turn, so that a set has
left the L2 cache when it is read again; ``sets_exceed_l2`` says where there was no room for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import match_cases, merge_cases, timing
from benchmarks.gpu.check_kernels import precompiled_kernels
from benchmarks.gpu.match_cases import MatchCase
from benchmarks.gpu.merge_cases import MergeCase
from benchmarks.gpu.parts import Context
from benchmarks.gpu.rows import attempt, emit
from benchmarks.harness import percentiles
from tome_export.merge import ops
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract
from tome_export.plugins.variants import Variant

WIDTH = 64
Match = Callable[[Tensor, int, int, bool], tuple[Tensor, Tensor, Tensor]]
Merge = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Operations:
    """One way to match and merge."""

    match: Match
    merge: Merge


EAGER = Operations(ops.eager_match, ops.eager_merge)


@dataclass(frozen=True)
class Shape:
    """The first layer of a model."""

    name: str
    heads: int
    tokens: int
    r: int

    def match_case(self, batch: int) -> MatchCase:
        """Keys as a view of the QKV product."""
        return MatchCase(batch, self.heads, self.tokens, WIDTH, self.r, layout="qkv")

    def merge_case(self, batch: int) -> MergeCase:
        """Tokens of the model's width."""
        return MergeCase(batch, self.tokens, self.heads * WIDTH, self.r)


SHAPES = (
    Shape("ViT-B/16", 12, 197, 16),
    Shape("ViT-L/16@384", 16, 577, 23),
    Shape("ViT-L/16@512", 16, 1025, 40),
)
BATCHES = (64, 8, 1)


def variants() -> list[Variant]:
    """Kernels that the shapes need."""
    return [
        *(match_contract.variant(shape.tokens, WIDTH, "float16") for shape in SHAPES),
        *(merge_contract.variant(shape.heads * WIDTH, "float16") for shape in SHAPES),
    ]


def main(context: Context) -> None:
    """Emit the copy bandwidth, then the rows of every shape and batch."""
    kernels = precompiled_kernels(context)
    found = {"kernels": Operations(kernels.match, kernels.merge), "eager": EAGER}
    emit_rows(found, SHAPES, BATCHES, context.device)


def emit_rows(
    ways: Mapping[str, Operations], shapes: Sequence[Shape], batches: Sequence[int], device: str
) -> None:
    """A row for both together per batch and shape, then one for each of the two."""
    bandwidth, copied = timing.copy_bandwidth(device)
    about = {"gigabytes_per_s": bandwidth / 1e9, "bytes": copied}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        about |= {"multiprocessors": properties.multi_processor_count}
        about |= {"memory_bytes": properties.total_memory, "l2_bytes": timing.l2_bytes()}
    emit("copy", **about)
    for measure in (both, match, merge):
        for batch in batches:
            for shape in shapes:
                row = {"shape": shape.name, "tokens": shape.tokens, "layout": "qkv"}
                row |= {"batch": batch, "r": shape.r, "dtype": "float16"}
                name = {both: "match+merge"}.get(measure, measure.__name__)
                attempt(name, row, measure, ways, shape, batch, bandwidth, device)


def both(
    ways: Mapping[str, Operations], shape: Shape, batch: int, bandwidth: float, device: str
) -> dict[str, Any]:
    """A match and the merge by its plan."""
    keys_case, case = shape.match_case(batch), shape.merge_case(batch)
    moved = match_cases.bytes_moved(keys_case) + merge_cases.bytes_moved(case)

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        keys = match_cases.make_keys(keys_case, generator)
        return keys, *merge_cases.make_inputs(case, generator)[:2]

    def chained(way: Operations) -> Callable[..., object]:
        def run(keys: Tensor, x: Tensor, size: Tensor) -> object:
            plan = way.match(keys, shape.r, keys_case.prefix, keys_case.class_token)
            return plan, way.merge(x, size, *plan)

        return run

    return _timed({n: chained(way) for n, way in ways.items()}, inputs, moved, bandwidth, device)


def match(
    ways: Mapping[str, Operations], shape: Shape, batch: int, bandwidth: float, device: str
) -> dict[str, Any]:
    """Keys to a plan."""
    case = shape.match_case(batch)
    runs = {
        name: lambda keys, way=way: way.match(keys, case.r, case.prefix, case.class_token)
        for name, way in ways.items()
    }
    moved = match_cases.bytes_moved(case)

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        return (match_cases.make_keys(case, generator),)

    return _timed(runs, inputs, moved, bandwidth, device)


def merge(
    ways: Mapping[str, Operations], shape: Shape, batch: int, bandwidth: float, device: str
) -> dict[str, Any]:
    """Tokens to fewer, by a random plan."""
    case = shape.merge_case(batch)

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        return merge_cases.make_inputs(case, generator)

    moved = merge_cases.bytes_moved(case)
    return _timed({n: way.merge for n, way in ways.items()}, inputs, moved, bandwidth, device)


def _timed(
    runs: Mapping[str, Callable[..., object]],
    make: Callable[[torch.Generator], tuple[Tensor, ...]],
    moved: int,
    bandwidth: float,
    device: str,
) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    first = make(generator)
    # The strided view keeps queries and values in memory; they are not read.
    held = sum(tensor.untyped_storage().nbytes() for tensor in first)
    l2 = timing.l2_bytes(device)
    turn = timing.rotation(moved, held, l2, timing.free_bytes(device))
    inputs = [first, *(make(generator) for _ in range(turn.sets - 1))]
    seconds = timing.timed(runs, inputs, turn.calls)
    return summary(seconds, moved, bandwidth, "eager") | {
        "calls_per_graph": turn.calls,
        "sets": turn.sets,
        "sets_exceed_l2": turn.sets * moved > l2,
    }


def summary(seconds: Mapping[str, Any], moved: int, bandwidth: float, base: str) -> dict[str, Any]:
    """Times, the floor, the share of it that each reaches, and ratios of one run.

    Args:
        seconds: Per call by name, ``[rounds]``.
        moved: Bytes that must move.
        bandwidth: Bytes per second of a copy.
        base: What the speed-ups are over.
    """
    floor = moved / bandwidth
    return {
        "seconds": {name: percentiles(values) for name, values in seconds.items()},
        "bytes": moved,
        "floor_seconds": floor,
        "share_of_floor": {
            name: floor / float(np.median(values)) for name, values in seconds.items()
        },
        "speedup": timing.medians_over(seconds, base),
    }
