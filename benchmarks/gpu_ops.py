"""How fast are match and merge, against PyTorch's operations and against the memory floor?

The floor is the time in which a plain copy on this GPU moves the bytes that the operation must
move. Calls are replayed in CUDA graphs and take several sets of inputs in turn, so that a set has
left the L2 cache when it is read again; ``sets_exceed_l2`` says where there was no room for that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gpu_timing as timing
import numpy as np
import torch
from gpu_check import install
from gpu_rows import attempt, emit
from harness import percentiles
from torch import Tensor
from torch.nn import functional

from tome_export.merge import ops
from tome_export.merge.plan import MergePlan
from tome_export.plugins import torch_ops
from tome_export.plugins.match import benchmark as match_benchmark
from tome_export.plugins.match.benchmark import Layout, MatchCase
from tome_export.plugins.merge import benchmark as merge_benchmark
from tome_export.plugins.merge.benchmark import MergeCase

PART = "ops"
BATCHES = (1, 8, 64, 256)
WIDTH = 64
LAYOUTS: tuple[Layout, ...] = ("contiguous", "qkv")


@dataclass(frozen=True)
class Shape:
    """The first layer of a model."""

    name: str
    heads: int
    tokens: int
    r: int


SHAPES = (
    Shape("ViT-B/16", 12, 197, 16),
    Shape("ViT-L/16", 16, 197, 8),
    Shape("ViT-L/16@384", 16, 577, 23),
)


def eager_match(keys: Tensor, r: int, prefix: int, class_token: bool) -> MergePlan:
    """``tome_export::match`` without its kernel."""
    with torch_ops.eager():
        return ops.match(keys, r, prefix, class_token)


def eager_merge(
    x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor
) -> tuple[Tensor, Tensor]:
    """``tome_export::merge`` without its kernel."""
    with torch_ops.eager():
        return ops.merge(x, size, MergePlan(keep, src, dst))


def main(quick: bool) -> None:
    """Emit the copy bandwidth, then the rows of every shape and batch."""
    install()
    bandwidth, copied = timing.copy_bandwidth()
    emit(PART, "copy", gigabytes_per_s=bandwidth / 1e9, bytes=copied)
    shapes, batches = (SHAPES[:1], (8,)) if quick else (SHAPES, BATCHES)
    for shape, batch in itertools.product(shapes, batches):
        about = {"shape": shape.name, "batch": batch, "r": shape.r, "dtype": "float16"}
        measures: list[tuple[str, Layout, Callable[..., dict[str, Any]]]] = [
            *(("match", layout, _match) for layout in LAYOUTS),
            ("merge", "contiguous", _merge),
            ("match+merge", "contiguous", _both),
            ("match+merge", "qkv", _both),
            ("around merge", "contiguous", _around),
        ]
        for name, layout, measure in measures:
            row = about | {"layout": layout}
            attempt(PART, name, row, measure, shape, batch, layout, bandwidth)


def _match_case(shape: Shape, batch: int, layout: Layout) -> MatchCase:
    return MatchCase(batch, shape.heads, shape.tokens, WIDTH, shape.r, layout=layout)


def _merge_case(shape: Shape, batch: int) -> MergeCase:
    return MergeCase(batch, shape.tokens, shape.heads * WIDTH, shape.r)


def _match(shape: Shape, batch: int, layout: Layout, bandwidth: float) -> dict[str, Any]:
    case = _match_case(shape, batch, layout)
    moved = match_benchmark.bytes_moved(case)
    # The strided view keeps queries and values in memory; they are not read.
    turn = _rotation(moved, moved * (3 if layout == "qkv" else 1))
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [(match_benchmark.make_keys(case, generator),) for _ in range(turn.sets)]
    runs = match_benchmark.candidates(case, lambda *given: tuple(eager_match(*given)))
    seconds = timing.timed(runs, inputs, turn.calls)
    return summary(seconds, moved, bandwidth, "eager") | _rotated(turn, moved)


def _merge(shape: Shape, batch: int, layout: Layout, bandwidth: float) -> dict[str, Any]:  # noqa: ARG001
    case = _merge_case(shape, batch)
    moved = merge_benchmark.bytes_moved(case)
    turn = _rotation(moved, moved)
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [merge_benchmark.make_inputs(case, generator) for _ in range(turn.sets)]
    seconds = timing.timed(merge_benchmark.candidates(eager_merge), inputs, turn.calls)
    return summary(seconds, moved, bandwidth, "eager") | _rotated(turn, moved)


def _both(shape: Shape, batch: int, layout: Layout, bandwidth: float) -> dict[str, Any]:
    keys_case, case = _match_case(shape, batch, layout), _merge_case(shape, batch)
    moved = match_benchmark.bytes_moved(keys_case) + merge_benchmark.bytes_moved(case)
    turn = _rotation(moved, moved * (2 if layout == "qkv" else 1))
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        (
            match_benchmark.make_keys(keys_case, generator),
            *merge_benchmark.make_inputs(case, generator)[:2],
        )
        for _ in range(turn.sets)
    ]
    matches = match_benchmark.candidates(keys_case, lambda *given: tuple(eager_match(*given)))

    def chain(match: Callable[[Tensor], Any], merge: Callable[..., Any]) -> Callable[..., Any]:
        def run(keys: Tensor, x: Tensor, size: Tensor) -> object:
            plan = match(keys)
            return plan, merge(x, size, *plan)

        return run

    runs = {
        name: chain(match, eager_merge if name == "eager" else torch_ops.merge)
        for name, match in matches.items()
    }
    seconds = timing.timed(runs, inputs, turn.calls)
    plans = matches["kernel tf32x3"](inputs[0][0])
    found = summary(seconds, moved, bandwidth, "eager") | _rotated(turn, moved)
    return found | {
        "largest_group": 1 + int(torch.stack([t.bincount().max() for t in plans[2]]).max())
    }


def _around(shape: Shape, batch: int, layout: Layout, bandwidth: float) -> dict[str, Any]:  # noqa: ARG001
    """What one kernel for residual add, merge and LayerNorm could save at most."""
    case = _merge_case(shape, batch)
    moved = merge_benchmark.bytes_moved_fused(case)
    turn = _rotation(moved, moved)
    generator = torch.Generator("cuda").manual_seed(0)
    weight, bias = (torch.rand(case.width, device="cuda", dtype=torch.float16) for _ in range(2))
    inputs = []
    for _ in range(turn.sets):
        x, *rest = merge_benchmark.make_inputs(case, generator)
        merged = torch.randn_like(x[:, case.r :].contiguous())
        inputs.append((torch.randn_like(x), merged, x, *rest))

    def norm(tokens: Tensor) -> Tensor:
        return functional.layer_norm(tokens, (case.width,), weight, bias, 1e-6)

    def together(added: Tensor, _: Tensor, x: Tensor, *rest: Tensor) -> object:
        merged, size = torch_ops.merge(added + x, *rest)
        return merged, size, norm(merged)

    runs: dict[str, Callable[..., object]] = {
        "add": lambda added, _, x, *__: added + x,
        "merge": lambda _, __, x, *rest: torch_ops.merge(x, *rest),
        "layer_norm": lambda _, merged, *__: norm(merged),
        "the three": together,
    }
    seconds = timing.timed(runs, inputs, turn.calls)
    found = summary(seconds, moved, bandwidth, None) | _rotated(turn, moved)
    # The floor is that of the fused kernel: only the three together compare with it.
    found["share_of_floor"] = {"the three": found["share_of_floor"]["the three"]}
    most = float(np.median(seconds["the three"])) - found["floor_seconds"]
    return found | {"saved_seconds_at_most": most}


def _rotation(moved: int, set_bytes: int) -> timing.Rotation:
    return timing.rotation(moved, set_bytes, timing.l2_bytes(), timing.free_bytes())


def _rotated(turn: timing.Rotation, moved: int) -> dict[str, Any]:
    return {
        "calls_per_graph": turn.calls,
        "sets": turn.sets,
        "sets_exceed_l2": turn.sets * moved > timing.l2_bytes(),
    }


def summary(
    seconds: Mapping[str, Any], moved: int, bandwidth: float, base: str | None
) -> dict[str, Any]:
    """Times, the floor, the share of it that each reaches, and ratios of one run.

    Args:
        seconds: Per call by name, ``[rounds]``.
        moved: Bytes that must move.
        bandwidth: Bytes per second of a copy.
        base: What the speed-ups are over; None for no speed-ups.
    """
    floor = moved / bandwidth
    found: dict[str, Any] = {
        "seconds": {name: percentiles(values) for name, values in seconds.items()},
        "bytes": moved,
        "floor_seconds": floor,
        "share_of_floor": {
            name: floor / float(np.median(values)) for name, values in seconds.items()
        },
    }
    return found | ({"speedup": timing.medians_over(seconds, base)} if base else {})
