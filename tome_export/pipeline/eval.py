"""``tome-export eval``: accuracy of an artifact, against unmerged and against PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.artifact import Artifact
from tome_export.errors import InputError, UsageError
from tome_export.evaluation.classify import Classifier
from tome_export.evaluation.source import Classes, Source
from tome_export.merge.schedule import Schedule
from tome_export.pipeline.eval_result import results_of
from tome_export.pipeline.eval_runs import UNMERGED, candidates_of
from tome_export.pipeline.eval_work import evaluated
from tome_export.pipeline.inputs import refuse_extra_inputs, refuse_videos
from tome_export.pipeline.manifest import output_shape
from tome_export.pipeline.reference import model_name, reference_model, rescheduled
from tome_export.progress import Progress, Silent
from tome_export.runtime.registry import ORT_CPU, TORCH, require
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    from tome_export.patch import MergedModel

EVAL = "eval.json"

SAMPLES = "samples"

AGAINST = (UNMERGED, TORCH)


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    Attributes:
        artifact: The artifact directory.
        data: A folder of images, shards, or ``samples``; see ``evaluation.find``.
        labels: File of labels for a folder of images.
        limit: Most images, taken evenly from the listing; None for all.
        batch: Images per batch; None for the one that the artifact is tuned for.
        workers: Processes that decode; 0 decodes in this one, None takes one per core.
        r: Constant schedules to compare besides.
        backend: What runs all but PyTorch.
        against: Of ``AGAINST``.
        weights: Where the weights are now, if not where they were at the build.
        ray: ``local`` or the address of a Ray cluster; None for this machine alone.
        restart: Begin anew where an evaluation was interrupted.
    """

    artifact: Path
    data: tuple[str, ...]
    labels: Path | None = None
    limit: int | None = None
    batch: int | None = None
    workers: int | None = 0
    r: tuple[int, ...] = ()
    backend: str = ORT_CPU
    against: tuple[str, ...] = AGAINST
    weights: str | None = None
    ray: str | None = None
    restart: bool = False


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        artifact: The artifact, with the result among its files.
        values: The content of ``eval.json``.
        unrecorded: Why the result is not in the artifact, as when that is read-only; else None.
    """

    artifact: Artifact
    values: dict[str, Any]
    unrecorded: str | None = None


def evaluate(request: EvalRequest, progress: Progress | None = None) -> EvalResult:
    """Evaluate an artifact; goes on where the same evaluation was killed.

    Raises:
        UsageError: if the request makes no sense.
        InputError: if the artifact, its weights, the images or their labels are not usable.
        MissingComponentError: if a backend or package is not here.
        ExportError: if a model cannot be exported or run.
    """
    from tome_export.bench.environment import cores, environment

    progress = progress or Silent()
    for name in request.against:
        if name not in AGAINST:
            raise UsageError(f"--against is {name!r}; expected {', '.join(AGAINST)} or none")
    if request.ray is None:
        require((request.backend,))
    else:
        from tome_export.evaluation.ray_data import require_ray

        require_ray()
    progress.stage("Verify the artifact")
    artifact = Artifact.open(request.artifact.absolute())
    refuse_videos(artifact, "eval")
    refuse_extra_inputs(artifact, "eval")
    batch = _batch(artifact, request)
    progress.stage("List the images")
    classes = classes_of(artifact)
    source = source_of(artifact, request, classes)
    chosen = selection(len(source), request.limit)
    progress.stage(f"Load {artifact.manifest.model.name}")
    model, _ = reference_model(artifact, request.weights)
    if classes is None:
        _check_comparable(artifact, model)
    with candidates_of(
        artifact, model, request.backend, request.against, request.r, progress
    ) as candidates:
        # By name: on the backend torch all are of PyTorch.
        plain = next((c for c in candidates if not any(c.r) and c.name != TORCH), None)
        if classes is None and plain is None:
            raise UsageError(
                "the model has no classes, so that all there is to tell is how near it is to the "
                "unmerged one; add unmerged to --against"
            )
        classifier = Classifier(
            batch,
            artifact.manifest.output.name,
            classes is not None,
            plain.run if plain else "",
        )
        work = evaluated(
            request, artifact, source, chosen, candidates, classifier, cores(), progress
        )
        with work as table:
            labels = None if source.labels is None or classes is None else source.labels[chosen]
            values = {
                **results_of(table, source, labels, candidates, classes, plain),
                "batch": batch,
                "environment": environment(),
            }
            return _recorded(artifact, values)


def _check_comparable(artifact: Artifact, model: MergedModel) -> None:
    """Features of all tokens that are left have another shape with every schedule."""
    merged, unmerged = (output_shape(m) for m in (model, rescheduled(model, Schedule(0))))
    if merged != unmerged:
        raise InputError(
            f"{artifact.path} gives features {list(merged)} per image, and {list(unmerged)} "
            "without merging, which do not compare; build it with --dense to compare features "
            "patch by patch"
        )


def classes_of(artifact: Artifact) -> Classes | None:
    """The classes of an artifact; None if it gives features."""
    output = artifact.manifest.output
    if output["name"] != "logits":
        return None
    names = artifact.manifest.labels
    count = int(output["shape"][-1])
    return Classes(count, tuple(names) if names and len(names) == count else None)


def selection(count: int, limit: int | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices of the images to take: evenly over the listing, which is sorted by class."""
    taken = count if limit is None else min(count, limit)
    return np.arange(taken, dtype=np.int64) * count // taken


def _batch(artifact: Artifact, request: EvalRequest) -> int:
    engine = artifact.manifest.engines.get(request.backend)
    able = BatchRange.parse((engine or artifact.manifest)["batch"])
    batch = able.opt if request.batch is None else request.batch
    if not able.min <= batch <= able.max:
        raise InputError(
            f"batch is {batch}; the artifact takes {able.min} to {able.max}, choose one of those "
            "or rebuild it with another --batch"
        )
    return batch


def source_of(artifact: Artifact, request: EvalRequest, classes: Classes | None) -> Source:
    """The images that a request names, listed.

    Raises:
        InputError: if there are none, or their labels are not usable.
        UsageError: if labels are given for what has its own.
    """
    from tome_export.evaluation.find import find_data
    from tome_export.evaluation.source import ArraySource
    from tome_export.models import resolve
    from tome_export.models.preprocess import IMAGE_SUFFIXES
    from tome_export.models.samples import labelled_samples

    if request.data != (SAMPLES,):
        return find_data(request.data, IMAGE_SUFFIXES, classes, request.labels)
    if request.labels is not None:
        raise UsageError("--labels are for a folder of images; the samples have their own")
    name = artifact.manifest.model.name
    found = labelled_samples(resolve(model_name(artifact.manifest, request.weights)))
    if found is None:
        raise InputError(f"no labelled images come with {name}; give a folder of them with --data")
    return ArraySource(found[0], found[1].astype(np.int32))


def _recorded(artifact: Artifact, values: dict[str, Any]) -> EvalResult:
    try:
        return EvalResult(artifact.record(EVAL, values), values)
    # The result stands also where it cannot be written down, as on a read-only mount.
    except InputError as error:
        return EvalResult(artifact, values, str(error))
