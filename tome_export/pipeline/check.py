"""``tome-export check``: parity of a ready artifact, against PyTorch with the same weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.artifact import PARITY, Artifact
from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.pipeline.build import parity_summary
from tome_export.pipeline.engine_parity import EngineRunnerFactory
from tome_export.pipeline.images import CHECK_COUNT, parity_images
from tome_export.pipeline.progress import Progress, Silent
from tome_export.pipeline.reference import reference_model
from tome_export.spec import BatchRange, Preprocessing

if TYPE_CHECKING:
    from tome_export.engine import Backend
    from tome_export.parity.decisions import Array
    from tome_export.parity.report import ParityReport
    from tome_export.patch import MergedModel

ORT_CPU = "ort-cpu"


@dataclass(frozen=True)
class CheckRequest:
    """What to check.

    Attributes:
        artifact: The artifact directory.
        images: Folder of images; None for the samples that come along.
        backends: ``ort-cpu``, ``tensorrt``, ``tensorrt-rtx``; empty for ONNX Runtime plus every
            engine of the artifact that this machine can run.
        weights: Where the weights are now, if not where they were at the build.
    """

    artifact: Path
    images: Path | None = None
    backends: tuple[str, ...] = ()
    weights: str | None = None


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        artifact: The artifact, with the new result in its manifest.
        reports: One per backend.
        accuracy: Top-1 on labelled sample images, ``unmerged`` (PyTorch, fp32) and ``merged``
            (the ONNX model on ONNX Runtime), where the recipe brings such images; else None.
        skipped: Backends that could not run here, with the reason.
        unrecorded: Why the result is not in the artifact, as when that is read-only; else None.
    """

    artifact: Artifact
    reports: tuple[ParityReport, ...]
    accuracy: dict[str, Any] | None
    skipped: dict[str, str]
    unrecorded: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every report passed."""
        return all(report.passed for report in self.reports)


def check(request: CheckRequest, progress: Progress | None = None) -> CheckResult:
    """Check an artifact again, here, on the user's images if given.

    Raises:
        InputError: if the artifact is damaged, its weights cannot be found or are others than at
            the build, or the images are not usable.
        MissingComponentError: if a backend asked for cannot run here.
    """
    from tome_export.models.samples import labelled_samples
    from tome_export.onnx.files import load
    from tome_export.parity.check import check_parity

    progress = progress or Silent()
    progress.stage("Verify the artifact")
    artifact = Artifact.open(request.artifact.absolute())
    manifest = artifact.manifest
    progress.stage(f"Load {manifest['model']['name']}")
    model, recipe = reference_model(artifact, request.weights)
    recipe = replace(recipe, preprocessing=Preprocessing.from_dict(manifest["preprocessing"]))
    images = parity_images(recipe, model.input_size, request.images, CHECK_COUNT)
    exported = load(artifact.model_path)
    batch = BatchRange.parse(manifest["batch"])
    reports: list[ParityReport] = []
    backends, skipped = _backends(artifact, request.backends)
    for name in backends:
        progress.stage(f"Check parity on {len(images)} images, {name}")
        options: dict[str, Any] = {}
        if name != ORT_CPU:
            factory = EngineRunnerFactory(artifact, name, progress)
            options = {"runner_factory": factory, "candidate": factory.name}
            batch = BatchRange.parse(manifest["engines"][name]["batch"])
        reports.append(
            check_parity(
                model,
                exported,
                images,
                manifest["precision"],
                batch,
                progress=progress.detail,
                **options,
            )
        )
    accuracy = None
    labelled = labelled_samples(recipe) if request.images is None else None
    if labelled is not None:
        progress.stage(f"Classify {len(labelled[1])} labelled test images")
        accuracy = _accuracy(model, exported, BatchRange.parse(manifest["batch"]), *labelled)
    unrecorded = None
    try:
        artifact = _record(artifact, reports)
    # The verdict stands also where it cannot be written down, as on a read-only mount.
    except InputError as error:
        unrecorded = str(error)
    return CheckResult(artifact, tuple(reports), accuracy, skipped, unrecorded)


def _backends(artifact: Artifact, asked: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
    from tome_export.engine.select import BACKENDS

    engines: dict[str, Backend] = {
        b.name: b for b in BACKENDS if b.name in artifact.manifest["engines"]
    }
    for name in asked:
        if name != ORT_CPU and name not in {b.name for b in BACKENDS}:
            known = ", ".join([ORT_CPU, *(b.name for b in BACKENDS)])
            raise UsageError(f"backend is {name!r}; expected one of {known}")
        if name != ORT_CPU and name not in engines:
            raise InputError(
                f"the artifact has no {name} engine; build one with 'tome-export engine "
                f"{artifact.path} --engine {name}'"
            )
        if name in engines and not (run := engines[name].can_run()).available:
            raise MissingComponentError(run.reason)
    if asked:
        return asked, {}
    able = {name: backend.can_run() for name, backend in engines.items()}
    skipped = {name: run.reason for name, run in able.items() if not run.available}
    return (ORT_CPU, *(n for n in engines if n not in skipped)), skipped


def _accuracy(
    model: MergedModel, exported: Any, batch: BatchRange, pixels: Array, labels: Array
) -> dict[str, Any]:
    """Top-1 of the unmerged model in PyTorch, fp32, and of the exported one."""
    import torch

    from tome_export.runtime.ort import OrtRunner
    from tome_export.runtime.runner import infer_in_batches
    from tome_export.spec import INPUT_NAME

    with torch.inference_mode():
        plain = model.library(torch.from_numpy(pixels)).numpy()
    output = exported.graph.output[0].name
    runner = OrtRunner(exported)
    merged = infer_in_batches(runner, {INPUT_NAME: pixels}, len(pixels), batch.max)[output]
    return {
        "images": len(labels),
        "unmerged": float((np.argmax(plain, axis=1) == labels).mean()),
        "merged": float((np.argmax(merged, axis=1) == labels).mean()),
    }


def _record(artifact: Artifact, reports: list[ParityReport]) -> Artifact:
    summary = parity_summary(min(reports, key=lambda report: report.passed))
    checks = {"checks": [report.to_dict() for report in reports]}
    return artifact.record(PARITY, checks, {"parity": summary})
