"""``tome-export check``: parity of a ready artifact, against PyTorch with the same weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.artifact import Artifact
from tome_export.artifact.parity import PARITY, ParityFile, ParityReport
from tome_export.data.images import CHECK_COUNT, image_names, parity_images
from tome_export.errors import InputError, ParityError, UsageError
from tome_export.merge.entropy import check_min_entropy, effective_tokens
from tome_export.progress import Progress, Silent
from tome_export.runtime.model import (
    ArtifactModel,
    check_engine,
    model_from_artifact,
    open_runner,
    reference_model,
)
from tome_export.runtime.registry import BACKENDS, TORCH, backend_of, require, usual_backends
from tome_export.runtime.runner import Runner, infer_in_batches
from tome_export.spec import INPUT_NAME

if TYPE_CHECKING:
    import onnx

    from tome_export.parity.decisions import Array
    from tome_export.patch import MergedModel


@dataclass(frozen=True)
class CheckRequest:
    """What to check.

    Attributes:
        artifact: The artifact directory.
        images: Folder of images; None for the samples that come along.
        backends: By name, all but ``torch``; empty for ONNX Runtime plus every engine of the
            artifact that this machine can run.
        weights: Where the weights are now, if not where they were at the build.
        min_entropy: Least token-size entropy of any image (``merge.entropy``); None for any.
    """

    artifact: Path
    images: Path | None = None
    backends: tuple[str, ...] = ()
    weights: str | None = None
    min_entropy: float | None = None


@dataclass(frozen=True)
class EntropyResult:
    """How evenly the images are spread over their tokens, by the decisions of what was checked.

    Attributes:
        patches: Patches of an image, or of all frames of a video: an entropy of 1 is so many
            effective tokens.
        least: The least entropy of all images.
        p5: The images' fifth percentile.
        median: The images' median.
        asked: What every image was to have; None for nothing.
        under: Name and entropy of the images that have less, the least first.
    """

    patches: int
    least: float
    p5: float
    median: float
    asked: float | None
    under: tuple[tuple[str, float], ...]

    def tokens(self, entropy: float) -> float:
        """Effective tokens of an entropy."""
        return effective_tokens(entropy, self.patches)


class OverMergedError(ParityError):
    """Images are merged into fewer effective tokens than was asked for."""

    def __init__(self, found: EntropyResult, images: int, subject: str = "image") -> None:
        name, least = found.under[0]
        asked = found.asked or 0.0
        super().__init__(
            f"over-merged: {len(found.under)} of {images} {subject}s have a token-size entropy "
            f"under {asked:g} ({found.tokens(asked):.1f} effective tokens of {found.patches}), the "
            f"least {least:.4f} ({found.tokens(least):.1f}, {name}); merge less, or ask for no more"
        )


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        artifact: The artifact, with the new result in its manifest.
        reports: One per backend.
        accuracy: Top-1 on labelled sample images, ``unmerged`` (PyTorch, fp32) and ``merged``
            (on the first backend checked, ``backend``), where the recipe brings such images; else
            None.
        skipped: Backends that could not run here, with the reason.
        entropy: Entropy of the images, the least of all reports.
        unrecorded: Why the result is not in the artifact, as when that is read-only; else None.
    """

    artifact: Artifact
    reports: tuple[ParityReport, ...]
    accuracy: dict[str, Any] | None
    skipped: dict[str, str]
    entropy: EntropyResult
    unrecorded: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every report passed, and no image is merged more than was asked for."""
        return all(report.passed for report in self.reports) and not self.entropy.under


def check(request: CheckRequest, progress: Progress | None = None) -> CheckResult:
    """Check an artifact again, here, on the user's images if given.

    Raises:
        InputError: if the artifact is damaged, its weights cannot be found or are others than at
            the build, or the images are not usable.
        MissingComponentError: if a backend asked for cannot run here.
        UsageError: if a backend is unknown, or the entropy not 0 to 1.
    """
    check_min_entropy(request.min_entropy)
    _check_names(request.backends)
    from tome_export.data.samples import labelled_samples
    from tome_export.onnx.files import load
    from tome_export.parity.compare import check_parity

    progress = progress or Silent()
    progress.stage("Verify the artifact")
    artifact = Artifact.open(request.artifact.absolute())
    manifest = artifact.manifest
    backends, skipped = _backends(artifact, request.backends)
    progress.stage(f"Load {manifest.model.name}")
    model, recipe = reference_model(artifact, request.weights)
    recipe = replace(recipe, preprocessing=manifest.preprocessing)
    images = parity_images(recipe, model.input_size, request.images, CHECK_COUNT, progress)
    exported = load(artifact.model_path)
    what = "videos" if model.takes_video else "images"
    runnables: dict[str, ArtifactModel] = {}
    reports: list[ParityReport] = []
    for name in backends:
        progress.stage(f"Check parity on {len(images)} {what}, {name}")
        runnables[name] = _runnable(artifact, name)
        engine = manifest.engines.get(name)
        title = backend_of(name).title
        reports.append(
            check_parity(
                model,
                exported,
                images,
                manifest.precision,
                runnables[name].batch,
                runner_factory=partial(_opened, name, runnables[name], progress),
                candidate=f"{engine.file} on {name}" if engine else f"onnx on {title}",
                engine=engine is not None,
                activation=manifest.activation,
                progress=progress.detail,
            )
        )
    accuracy = None
    labelled = labelled_samples(recipe) if request.images is None else None
    # None for features, for other classes than those of the samples, and where it would be the
    # accuracy of the random inputs that parity is checked on.
    same = manifest.labels is not None and manifest.labels == recipe.output.labels
    if labelled is not None and same and not model.extra_inputs:
        progress.stage(f"Classify {len(labelled[1])} labelled test images")
        name, runnable = next(iter(runnables.items()))
        with open_runner(name, runnable, progress) as runner:
            found = _accuracy(model, runner, runnable, *labelled)
        accuracy = {"backend": backend_of(name).title, **found}
    unrecorded = None
    try:
        worst = min(reports, key=lambda report: report.passed)
        artifact = artifact.record(PARITY, ParityFile(checks=tuple(reports)), worst.summary())
    # The verdict stands also where it cannot be written down, as on a read-only mount.
    except InputError as error:
        unrecorded = str(error)
    names = image_names(request.images, len(images), videos=model.takes_video)
    # An entropy is of all frames of a video.
    frames = model.input_size[0] if model.takes_video else 1
    patches = frames * (model.tower.tokens - model.prefix)
    entropy = _entropy(reports, names, patches, request.min_entropy)
    return CheckResult(artifact, tuple(reports), accuracy, skipped, entropy, unrecorded)


def _entropy(
    reports: list[ParityReport], names: list[str], patches: int, asked: float | None
) -> EntropyResult:
    least = np.min([report.entropy for report in reports], axis=0)
    under = [(names[i], float(least[i])) for i in np.argsort(least, kind="stable").tolist()]
    return EntropyResult(
        patches=patches,
        least=float(least.min()),
        p5=float(np.percentile(least, 5)),
        median=float(np.median(least)),
        asked=asked,
        under=tuple((name, value) for name, value in under if asked is not None and value < asked),
    )


def _runnable(artifact: Artifact, name: str) -> ArtifactModel:
    """What a backend runs of an artifact, in the batch sizes that it takes."""
    model = model_from_artifact(artifact, str(artifact.path))
    return replace(model, batch=artifact.manifest.batch_on(name))


def _opened(
    name: str, runnable: ArtifactModel, progress: Progress, graph: onnx.ModelProto
) -> AbstractContextManager[Runner]:
    """A runner of the shipped graph, or of its twin, which an engine has to be built of first."""
    from tome_export.onnx.twin import is_twin

    engines = {} if is_twin(graph) else runnable.engines
    return open_runner(name, replace(runnable, graph=graph, engines=engines), progress)


def _check_names(asked: tuple[str, ...]) -> None:
    known = [name for name in BACKENDS if name != TORCH]
    for name in asked:
        if name == TORCH:
            raise UsageError(
                f"backend is {name!r}, which is what the others are checked against; choose another"
            )
        if name not in known:
            raise UsageError(f"backend is {name!r}; expected one of {', '.join(known)}")


def _backends(artifact: Artifact, asked: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
    engines = artifact.manifest.engines
    if not asked:
        return usual_backends(engines)
    require(asked)
    for name in asked:
        check_engine(artifact, name)
    return asked, {}


def _accuracy(
    model: MergedModel, runner: Runner, runnable: ArtifactModel, pixels: Array, labels: Array
) -> dict[str, Any]:
    """Top-1 of the unmerged model in PyTorch, fp32, and of the exported one."""
    import torch

    with torch.inference_mode():
        plain = model.library(model.library_pixels(torch.from_numpy(pixels))).numpy()
    outputs = infer_in_batches(runner, {INPUT_NAME: pixels}, len(pixels), runnable.batch.max)
    merged = outputs[runnable.output_name]
    return {
        "images": len(labels),
        "unmerged": float((np.argmax(plain, axis=1) == labels).mean()),
        "merged": float((np.argmax(merged, axis=1) == labels).mean()),
    }
