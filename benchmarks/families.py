"""Does every family hold what is said of it, from its library to a model repository?

One tiny model per family (``family_models.py``) through the real ``build``. Without merging, the
patched model and the artifact's ONNX model are compared with the untouched library model. With
merging at the recommended r, the plans of PyTorch are compared with those of
``merge/reference.py`` on the same keys, and those of the exported graph on ONNX Runtime with
PyTorch's in fp32 and fp16; a TensorRT-RTX engine is built, and the artifact is written into a
model repository, with preprocessing. Prints a table; writes benchmarks/results/families.json.

    python -m benchmarks.families [--family TEXT ...] [--no-engine] [--no-write]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.family_models import FAMILIES, Family
from benchmarks.harness import write_rows
from tome_export.artifact import Artifact
from tome_export.artifact.parity import PARITY, ParityFile
from tome_export.build import BuildRequest, build
from tome_export.data.images import parity_images
from tome_export.merge import reference
from tome_export.merge.schedule import Schedule
from tome_export.runtime.model import reference_model, rescheduled
from tome_export.runtime.ort import OrtRunner
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.spec import INPUT_NAME

IMAGES = 4
LIBRARY_LIMIT = 1e-5
"""Relative difference from the library that is allowed without merging."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", default=[], help="only those with this text")
    parser.add_argument("--no-engine", action="store_true", help="do not build engines")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    rows = []
    print(HEADER, flush=True)
    for family in FAMILIES:
        title = f"{family.library} {family.name}"
        if not arguments.family or any(text in title for text in arguments.family):
            rows.append(family_row(family, not arguments.no_engine))
            show(rows[-1])
    failed = [row for row in rows if row["failures"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} families passed")
    if not arguments.no_write:
        print(write_rows("families", rows))
    return int(bool(failed))


def family_row(family: Family, engine: bool) -> dict[str, Any]:
    """Build, check and serve one family, in a folder of its own."""
    with fresh_folder():
        name, untouched = family.make()
        request = {"model": name, **family.form}
        plain = build(
            BuildRequest(**request, output=Path("r0"), schedule=Schedule(), engine="none")
        )
        merged = build(BuildRequest(**request, output=Path("fp32"), engine="none"))
        half = build(
            BuildRequest(
                **request,
                output=Path("fp16"),
                precision="fp16",
                engine="tensorrt-rtx" if engine else "none",
            )
        )
        found = {
            **unmerged_errors(plain, untouched),
            **reference_plans(merged),
            "fp32": parity_of(merged),
            "fp16": parity_of(half),
            "served": [model.name for model in served(half).models],
        }
        built = half.manifest.engines.get("tensorrt-rtx")
    manifest = merged.manifest
    row = {
        "benchmark": "families",
        "family": family.name,
        "library": family.library,
        "model": name,
        "class": manifest.model.description.partition(";")[0],
        "form": {key: getattr(value, "given", value) for key, value in family.form.items()},
        "outputs": {out.name: out.shape for out in manifest.outputs},
        "tokens": [manifest.tokens_in, *manifest.tokens],
        "r": manifest.merge.r,
        "prefix": manifest.merge.prefix,
        "macs_ratio": manifest.macs.ratio,
        "images": IMAGES,
        **found,
        "engine_bytes": built and built.size_bytes,
    }
    return {**row, "failures": breaches(row, engine)}


@contextlib.contextmanager
def fresh_folder() -> Iterator[None]:
    """An empty current folder, so that names of checkpoint folders are short."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def unmerged_errors(artifact: Artifact, untouched: Any) -> dict[str, float]:
    """Largest differences from the library at r = 0, relative to its largest output."""
    model, images = model_and_images(artifact)
    with torch.inference_mode():
        pixel_values = torch.from_numpy(images)
        expected = untouched(pixel_values).numpy()
        patched = rescheduled(model, Schedule())(pixel_values)
    patched = patched[0] if isinstance(patched, tuple) else patched
    with OrtRunner(artifact.model_path) as runner:
        exported = runner.infer({INPUT_NAME: images})[artifact.manifest.output.name]
    errors = {}
    for key, found in (("patched", patched.numpy()), ("onnx", exported)):
        if found.shape != expected.shape:
            raise SystemExit(f"{key} gives {found.shape}, the library {expected.shape}")
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        errors[f"r0_relative_error_{key}"] = float(difference)
    return errors


def reference_plans(artifact: Artifact) -> dict[str, int]:
    """How many plans PyTorch made, and how many are not those of ``merge/reference.py``."""
    model, images = model_and_images(artifact)
    with torch.inference_mode():
        _, trace = model.forward_traced(torch.from_numpy(images))
    differing = 0
    for step in trace:
        r = model.layers[step.layer].r
        for image in range(len(images)):
            metric = reference.mean_keys(step.keys[image].tolist())
            plan = reference.match(metric, r, model.prefix, model.class_token)
            found = [part[image].tolist() for part in step.plan]
            differing += found != [plan.keep, plan.src, plan.dst]
    return {"reference_plans": len(trace) * len(images), "reference_plans_differing": differing}


def model_and_images(artifact: Artifact) -> tuple[Any, Any]:
    """The PyTorch model of an artifact, and photographs for it."""
    model, recipe = reference_model(artifact)
    return model, parity_images(recipe, model.input_size, None, IMAGES)


def parity_of(artifact: Artifact) -> dict[str, Any]:
    """The numbers of the build's own parity report, in the terms of ``recipes.py``."""
    (report,) = ParityFile.read(artifact.path / PARITY).checks
    return {
        "passed": report.passed,
        "failures": report.failures,
        "decisions": report.decisions,
        "disagreements": report.disagreements,
        "defects": report.defects,
        "largest_margin": max((layer.largest_margin for layer in report.layers), default=0.0),
        "margin_bound": min((layer.margin_bound for layer in report.layers), default=0.0),
        "source_map_defects": report.source_map_defects,
        "relative_error": report.output.relative,
        "led_relative_error": report.led_output.relative,
        "cosine": report.output.cosine,
    }


def served(artifact: Artifact) -> Any:
    """What the repository writer makes of an artifact; it checks every config before writing."""
    options = ServeOptions(preprocess=artifact.manifest.input.shape[1] in (1, 3))
    return serve(ServeRequest((artifact.path,), Path("repository"), options))


def breaches(row: dict[str, Any], engine: bool) -> list[str]:
    """What a family misses of what it has to hold."""
    found = [f"{form}: {text}" for form in ("fp32", "fp16") for text in row[form]["failures"]]
    for key in ("patched", "onnx"):
        error = row[f"r0_relative_error_{key}"]
        if not error <= LIBRARY_LIMIT:
            found.append(f"r = 0, {key}: relative error {error:.1e} exceeds {LIBRARY_LIMIT:.0e}")
    if row["reference_plans_differing"] or not row["reference_plans"]:
        found.append(
            f"{row['reference_plans_differing']} of {row['reference_plans']} plans are not the "
            "reference's"
        )
    if row["fp32"]["disagreements"] or not row["fp32"]["decisions"]:
        found.append(
            f"{row['fp32']['disagreements']} of {row['fp32']['decisions']} decisions differ in fp32"
        )
    if engine and not row["engine_bytes"]:
        found.append("no TensorRT-RTX engine")
    if not row["served"]:
        found.append("not served")
    return found


HEADER = (
    f"{'library':13s} {'family':33s} {'tokens':>8s} {'r=0':>8s} {'r=0 onnx':>8s} "
    f"{'plans':>7s} {'fp32':>8s} {'fp16':>14s} {'engine':>7s} served"
)


def show(row: dict[str, Any]) -> None:
    fp32, fp16 = row["fp32"], row["fp16"]
    engine = f"{row['engine_bytes'] / 1e6:.1f} MB" if row["engine_bytes"] else "-"
    plans = f"{row['reference_plans'] - row['reference_plans_differing']}/{row['reference_plans']}"
    explained = f"{fp16['disagreements']}/{fp16['decisions']}, {fp16['defects']} bad"
    print(
        f"{row['library']:13s} {row['family']:33s} {row['tokens'][0]:3d}->{row['tokens'][-1]:3d} "
        f"{row['r0_relative_error_patched']:8.1e} {row['r0_relative_error_onnx']:8.1e} "
        f"{plans:>7s} {fp32['disagreements']:3d}/{fp32['decisions']:4d} {explained:>14s} "
        f"{engine:>7s} {len(row['served'])} models",
        flush=True,
    )
    for failure in row["failures"]:
        print(f"    {failure}")


if __name__ == "__main__":
    sys.exit(main())
