"""PyTorch's side of the comparison: the fp32 reference, and its own error in a precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.parity.decisions import Array, Plan

if TYPE_CHECKING:
    import torch

    from tome_export.merge.plan import Step, StepPlans
    from tome_export.patch import LayerTrace, MergedModel
    from tome_export.spec import Precision

CHUNK = 8
"""Images per PyTorch pass: bounds memory, whatever the number of images."""


@dataclass(frozen=True)
class LayerRecord:
    """One layer that removes tokens, over all images; plans are stacked as ``[B, ...]``.

    Attributes:
        signals: What the decisions hang on, each ``[B, ...]``: the metric ``[B, N, D]`` of a
            match, or else the scores of the reducer.
        keep: See ``MergePlan``, as are the others.
    """

    signals: tuple[Array, ...]
    keep: Array
    src: Array
    dst: Array

    def plan(self, image: int) -> Plan:
        """The plan of one image."""
        return Plan(self.keep[image], self.src[image], self.dst[image])


@dataclass(frozen=True)
class Pass:
    """A forward pass over all images.

    Attributes:
        output: ``[B, ...]``, the model's main output.
        layers: The merges of the model. Where a merge works on several sequences of one image or
            video, those of all images follow each other.
        source_map: ``[B, patches]`` int32 of a graph that gives it; else None.
        entropy: ``[B]`` float32 of a graph that gives it; else None.
    """

    output: Array
    layers: dict[Step, LayerRecord]
    source_map: Array | None = None
    entropy: Array | None = None


Inputs = Mapping[str, Array]


def run_reference(model: MergedModel, images: Array, inputs: Inputs | None = None) -> Pass:
    """PyTorch in fp32, deciding for itself, on images and other inputs, each ``[B, ...]``."""
    return _run(model, images, _dtype("fp32"), None, inputs or {})


def run_yardstick(
    model: MergedModel,
    images: Array,
    precision: Precision,
    lead: Pass,
    inputs: Inputs | None = None,
) -> Pass:
    """PyTorch in the candidate's precision, led by the reference's plans.

    Its distance from the reference is the error that the precision itself costs, and so the
    measure for the candidate's. For fp32 the pass runs in fp64: its distance from the reference
    is the reference's own rounding error.
    """
    from tome_export.patch.precision import copy_with_dtype, in_float64

    dtype = _dtype("fp64" if precision == "fp32" else precision)
    if precision == "fp32":
        with in_float64(model):
            return _run(model, images, dtype, lead, inputs or {})
    return _run(copy_with_dtype(model, dtype), images, dtype, lead, inputs or {})


def _dtype(name: str) -> torch.dtype:
    import torch

    return {
        "fp64": torch.float64,
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
    }[name]


def _run(
    model: MergedModel, images: Array, dtype: torch.dtype, lead: Pass | None, inputs: Inputs
) -> Pass:
    import torch

    from tome_export.patch.precision import floats_to

    outputs: list[Array] = []
    parts: dict[Step, list[tuple[Array, ...]]] = {}

    def record(step: LayerTrace) -> None:
        arrays = (*(part.numpy() for part in step.chosen), *map(_numpy, step.signals))
        parts.setdefault(step.step, []).append(arrays)

    for start in range(0, len(images), CHUNK):
        chunk = slice(start, start + CHUNK)
        forced = None if lead is None else _plans(lead, chunk)
        with torch.inference_mode():
            pixel_values = floats_to(torch.from_numpy(images[chunk]), dtype)
            extra = {name: torch.from_numpy(x[chunk]).to(dtype) for name, x in inputs.items()}
            output = model.forward_observed(pixel_values, record, forced, extra)
        outputs.append(_numpy(output))
    layers = {}
    for layer, rows in parts.items():
        keep, src, dst, *signals = (np.concatenate(c) for c in zip(*rows, strict=True))
        layers[layer] = LayerRecord(tuple(signals), keep, src, dst)
    return Pass(np.concatenate(outputs), layers)


def _plans(lead: Pass, chunk: slice) -> StepPlans:
    import torch

    from tome_export.merge.plan import MergePlan

    plans = {}
    for step, record in lead.layers.items():
        each = len(record.keep) // len(lead.output)
        rows = slice(chunk.start * each, chunk.stop * each)
        parts = (record.keep, record.src, record.dst)
        plans[step] = MergePlan(*(torch.from_numpy(part[rows]) for part in parts))
    return plans


def _numpy(tensor: Any) -> Array:
    import torch

    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    result: Array = wide.numpy()
    return result
