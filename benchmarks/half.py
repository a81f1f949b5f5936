"""Does half precision bear the outliers of trained weights?

The tower of the trained DINOv2 (``scripts/trained_dinov2.py``), whose residual stream has channels
far above all others, on crops of photographs.

- activations: the largest value that any module of a block gives, in PyTorch in fp32, as a share of
  the largest number of fp16.
- parity: the exported graph in every precision, form of attention and opset against PyTorch in
  fp32, as ``tome-export check`` does it, in ONNX Runtime and OpenVINO, beside what PyTorch itself
  loses in the same precision. ONNX Runtime's CPU computes bf16 in fp32 and rounds every result.

Rows go into the file of ``benchmarks.trained`` as they are measured; what is there is left out.

    python -m benchmarks.half FOLDER [--sizes 224,518] [--builds NUMBER,…] [--again] [--no-write]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from benchmarks.trained import NAME, Rows, crops, load
from tome_export.models.recipe import LoadedModel
from tome_export.onnx import files
from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.parity.compare import check_parity
from tome_export.patch import MergedModel, patch
from tome_export.runtime.registry import backend_of
from tome_export.runtime.runner import Runnable, Runner
from tome_export.spec import AttentionForm, BatchRange, Precision

LARGEST_FP16 = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True)
class Build:
    """One exported graph, and on what and how many images it is checked."""

    size: int
    r: int
    precision: Precision
    attention: AttentionForm
    opset: int
    images: int = 7
    backends: tuple[str, ...] = ("ort-cpu",)

    def __str__(self) -> str:
        form = f"{self.precision}, {self.attention}, opset {self.opset}"
        return f"{self.size} pixels, r = {self.r}, {form}"


BOTH = ("ort-cpu", "openvino")
BUILDS = (
    Build(224, 8, "fp16", "fused", 23, backends=BOTH),
    Build(224, 16, "fp32", "parts", 17, backends=BOTH),
    Build(224, 16, "fp32", "fused", 23),
    Build(224, 16, "fp16", "fused", 23, backends=BOTH),
    Build(224, 16, "fp16", "fused-fp32", 23),
    Build(224, 16, "fp16", "parts", 17, backends=BOTH),
    Build(224, 16, "bf16", "fused", 23),
    Build(224, 16, "bf16", "parts", 22),
    Build(518, 80, "fp32", "parts", 23, images=3),
    Build(518, 80, "fp16", "fused", 23, images=3),
    Build(518, 80, "bf16", "fused", 23, images=3),
)
"""Forms of attention and opsets in pairs: fused forms are of opset 23, bf16 begins with 22."""

CROPPED = 3
"""Every so-manieth photograph gives one crop."""


def largest_by_block(model: MergedModel, images: torch.Tensor) -> list[tuple[float, str]]:
    """The largest absolute value that a module of each block gives, and the module's name."""
    found: list[tuple[float, str]] = []
    handles = []

    def watch(layer: int, name: str, part: nn.Module) -> Any:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            value = float(output.abs().max()) if isinstance(output, torch.Tensor) else 0.0
            found[layer] = max(found[layer], (value, name))

        return part.register_forward_hook(note)

    for layer, block in enumerate(model.blocks):
        found.append((0.0, ""))
        handles += [watch(layer, name, part) for name, part in block.named_modules()]
    try:
        with torch.inference_mode():
            model.library(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def measure_activations(loaded: LoadedModel, size: int, rows: Rows) -> None:
    """One row: every block's largest activation."""
    same = {"benchmark": NAME, "part": "activations", "size": size}
    same |= {"weights": loaded.weights.sha256}
    if rows.has(same):
        return
    images = crops(loaded, 1, CROPPED).pixels
    backbone: Any = loaded.module.backbone
    found = largest_by_block(patch(backbone, 0), images)
    rows.add(
        {
            **same,
            "images": len(images),
            "largest": [value for value, _ in found],
            "modules": [name or "(the block)" for _, name in found],
            "share_of_fp16": max(value for value, _ in found) / LARGEST_FP16,
        }
    )


def measure_parity(loaded: LoadedModel, build: Build) -> Iterator[dict[str, Any]]:
    """A row per backend."""
    backbone: Any = loaded.module.backbone
    model = patch(backbone, build.r).eval()
    images = crops(loaded, 1, CROPPED).pixels[: build.images].numpy()
    batch = BatchRange(1, build.images, build.images)
    options = ExportOptions(
        precision=build.precision, batch=batch, attention=build.attention, opset=build.opset
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx_from_model(model, path, options, "features")
        graph = files.load(path)
    for name in build.backends:
        report = check_parity(
            model,
            graph,
            images,
            build.precision,
            batch,
            runner_factory=partial(_opened, name, build),
            candidate=f"onnx on {backend_of(name).title}",
        )
        yield {
            "r": build.r,
            "precision": build.precision,
            "attention": build.attention,
            "opset": build.opset,
            "backend": name,
            "images": build.images,
            "passed": report.passed,
            "failures": report.failures,
            "decisions": report.decisions,
            "disagreements": report.disagreements,
            "defects": report.defects,
            "cosine": report.output.cosine,
            "led_error": report.led_output.max_abs,
            "led_allowed": report.led_allowed,
            "k": report.k,
            "score_error_share": max(
                layer.score_error / layer.score_error_allowed for layer in report.layers
            ),
        }


def _opened(
    backend: str, build: Build, graph: onnx.ModelProto | Path
) -> AbstractContextManager[Runner]:
    runnable = Runnable(
        label=str(build), precision=build.precision, output_name="features", graph=graph
    )
    return backend_of(backend).open(runnable)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what scripts/trained_dinov2.py wrote")
    parser.add_argument("--sizes", default="224,518", help="image sizes, in pixels")
    parser.add_argument("--builds", help="numbers of the builds, from 0; all without it")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    rows = Rows(write=not arguments.no_write, again=arguments.again)
    wanted = range(len(BUILDS)) if arguments.builds is None else arguments.builds.split(",")
    builds = [BUILDS[int(number)] for number in wanted]
    for size in map(int, arguments.sizes.split(",")):
        loaded = load(arguments.folder, size)
        measure_activations(loaded, size, rows)
        for build in (build for build in builds if build.size == size):
            same = {"benchmark": NAME, "part": "parity", "size": size}
            same |= {"weights": loaded.weights.sha256}
            keys = [{**same, "build": f"{build}, {name}"} for name in build.backends]
            if all(map(rows.has, keys)):
                continue
            for key, row in zip(keys, measure_parity(loaded, build), strict=True):
                rows.add({**key, **row})


if __name__ == "__main__":
    main()
