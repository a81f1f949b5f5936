"""``tome-export eval``: accuracy of an artifact, against unmerged and against PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact import Artifact
from tome_export.artifact.environment import versions
from tome_export.artifact.evaluation import (
    EVAL,
    CandidateResult,
    Cosines,
    Evaluation,
    EvaluationData,
    UnreadableImage,
)
from tome_export.data.decode import Decode, Task, decoded_chunks
from tome_export.data.find import source_of
from tome_export.data.labels import Classes, classes_of
from tome_export.data.metrics import (
    CONFIDENCE,
    METHODS,
    deviations,
    paired_difference,
    share_of,
)
from tome_export.data.source import Labels, Source, selection
from tome_export.errors import InputError, UsageError
from tome_export.evaluate.journal import Journal, open_journal
from tome_export.evaluate.records import TOP, Classifier, Record, Table
from tome_export.evaluate.runs import (
    UNMERGED,
    Candidate,
    candidates_of,
    open_runs,
    packed,
)
from tome_export.merge.schedule import Schedule
from tome_export.patch.describe import output_shape
from tome_export.progress import Progress, Silent
from tome_export.runtime.inputs import refuse_extra_inputs, refuse_videos
from tome_export.runtime.model import reference_model, rescheduled
from tome_export.runtime.registry import ORT_CPU, TORCH, require
from tome_export.spec import Activation

if TYPE_CHECKING:
    from tome_export.patch import MergedModel

AGAINST = (UNMERGED, TORCH)

TOP5_FROM = 10
"""Fewest classes for which top-5 is told: with fewer, guessing is right most of the time."""


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    Attributes:
        artifact: The artifact directory.
        data: A folder of images, shards, or ``samples``; see ``data.find``.
        labels: File of labels for a folder of images.
        classes_in_order: As of ``data.labels.Classes``.
        limit: Most images, taken evenly from the listing; None for all.
        batch: Images per batch; None for the one that the artifact is tuned for.
        workers: Processes that decode ahead; 0 for none, None takes one per core.
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
    classes_in_order: bool = False
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
        evaluation: The content of ``eval.json``.
        unrecorded: Why the result is not in the artifact, as when that is read-only; else None.
    """

    artifact: Artifact
    evaluation: Evaluation
    unrecorded: str | None = None


def evaluate(request: EvalRequest, progress: Progress | None = None) -> EvalResult:
    """Evaluate an artifact; goes on where the same evaluation was killed.

    Raises:
        UsageError: if the request makes no sense.
        InputError: if the artifact, its weights, the images or their labels are not usable.
        MissingComponentError: if a backend or package is not here.
        ExportError: if a model cannot be exported or run.
    """
    progress = progress or Silent()
    for name in request.against:
        if name not in AGAINST:
            raise UsageError(f"--against is {name!r}; expected {', '.join(AGAINST)} or none")
    if request.ray is None:
        require((request.backend,))
    else:
        from tome_export.evaluate.ray_data import require_ray

        require_ray()
    progress.stage("Verify the artifact")
    artifact = Artifact.open(request.artifact.absolute())
    refuse_videos(artifact, "eval")
    refuse_extra_inputs(artifact, "eval")
    batch = _batch(artifact, request)
    progress.stage("List the images")
    classes = classes_of(artifact)
    if classes is not None:
        classes = replace(classes, in_order=request.classes_in_order)
    source = source_of(artifact, request.data, request.labels, classes, request.weights)
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
        work = _Work(request, artifact, source, chosen, candidates, progress)
        activation = artifact.manifest.activation
        classifier = Classifier(
            batch, artifact.manifest.output.name, activation, plain.run if plain else ""
        )
        with work.table(classifier) as table:
            labels = None if source.labels is None or classes is None else source.labels[chosen]
            return _recorded(
                artifact,
                evaluation_from_table(
                    table, source, labels, candidates, classes, plain, activation
                ),
            )


def _check_comparable(artifact: Artifact, model: MergedModel) -> None:
    """Features of all tokens that are left have another shape with every schedule."""
    merged, unmerged = (output_shape(m) for m in (model, rescheduled(model, Schedule(0))))
    if merged != unmerged:
        raise InputError(
            f"{artifact.path} gives features {list(merged)} per image, and {list(unmerged)} "
            "without merging, which do not compare; build it with --dense to compare features "
            "patch by patch"
        )


def _batch(artifact: Artifact, request: EvalRequest) -> int:
    engine = artifact.manifest.engines.get(request.backend)
    able = (engine or artifact.manifest).batch
    batch = able.opt if request.batch is None else request.batch
    if not able.min <= batch <= able.max:
        raise InputError(
            f"batch is {batch}; the artifact takes {able.min} to {able.max}, choose one of those "
            "or rebuild it with another --batch"
        )
    return batch


def _recorded(artifact: Artifact, evaluation: Evaluation) -> EvalResult:
    try:
        return EvalResult(artifact.record(EVAL, evaluation), evaluation)
    # The result stands also where it cannot be written down, as on a read-only mount.
    except InputError as error:
        return EvalResult(artifact, evaluation, str(error))


@dataclass(frozen=True)
class _Work:
    """Chunks of images to a table of records, journal between them.

    Attributes:
        request: Where and how to run.
        artifact: What is evaluated.
        source: All images.
        chosen: Indices of those to take ``[B]``.
        candidates: What to run.
        progress: Told of each chunk.
    """

    request: EvalRequest
    artifact: Artifact
    source: Source
    chosen: NDArray[np.int64]
    candidates: Sequence[Candidate]
    progress: Progress

    @contextlib.contextmanager
    def table(self, classifier: Classifier) -> Iterator[Table]:
        """Run every chunk that is not in the journal yet; all results are computed from the table.

        The journal is deleted when the block ends without an error: what fails in there, as for
        want of memory or space, does not cost the work.

        Raises:
            InputError: if no image can be read, or the same evaluation is running already.
            ExportError: if a model fails.
        """
        runs = list(dict.fromkeys(candidate.run for candidate in self.candidates))
        images = len(self.chosen)
        table = Table(images, classifier.batch)
        with self._journal(runs, classifier.batch) as journal:
            if journal is not None:
                journal.clear() if self.request.restart else self._resume(journal, table, runs)
            if table.missing():
                models = f"{len(runs)} model{'s' if len(runs) > 1 else ''}"
                self.progress.stage(f"Classify {images} images, {models}")
                with self._records(classifier, table) as new:
                    for record in new:
                        if journal is not None:
                            journal.append(record)
                        table.add(record)
                        self.progress.step("images", table.images_done, images)
            try:
                table.require_images()
                yield table
            except InputError:
                # Whatever made all images unreadable, as a mount that was not there, may have gone.
                if journal is not None and not table.readable.any():
                    journal.remove()
                raise
            if journal is not None:
                journal.remove()

    @contextlib.contextmanager
    def _records(self, classifier: Classifier, table: Table) -> Iterator[Iterator[Record]]:
        """Records as they come; closed at once when the block ends, also by an interrupt."""
        from tome_export.data.preprocess import pixels_from_bytes
        from tome_export.runtime.environment import cores

        decode: Decode = partial(
            pixels_from_bytes, preprocessing=self.artifact.manifest.preprocessing
        )
        chunks = self._tasks(table, classifier.batch)
        with contextlib.ExitStack() as stack:
            if self.request.ray is not None:
                from tome_export.evaluate.ray_data import ray_records

                opener = packed(self.candidates).open
                found = ray_records(
                    list(chunks), decode, opener, classifier, self.request.ray, cores(),
                    self.source.roots,
                )  # fmt: skip
                yield stack.enter_context(contextlib.closing(found))
                return
            runners = stack.enter_context(open_runs(self.candidates, self.progress))
            workers = cores() if self.request.workers is None else self.request.workers
            workers = 0 if self.source.kind == "samples" else workers
            decoded = stack.enter_context(
                contextlib.closing(decoded_chunks(chunks, decode, workers))
            )
            yield (classifier.record(chunk, runners) for chunk in decoded)

    def _tasks(self, table: Table, batch: int) -> Iterator[Task]:
        for chunk in table.missing():
            part = self.chosen[chunk * batch : (chunk + 1) * batch]
            yield Task(chunk, tuple(self.source.items(part)))

    @contextlib.contextmanager
    def _journal(self, runs: list[str], batch: int) -> Iterator[Journal | None]:
        """The journal; None where it cannot be written, as with a home that is read-only."""
        manifest = self.artifact.manifest
        key = {
            "files": {
                name: file.model_dump(mode="json")
                for name, file in manifest.files.items()
                if not name.endswith(".json")
            },
            "weights": manifest.model.weights.state_sha256,
            "activation": manifest.activation,
            "data": self.source.digest,
            "limit": len(self.chosen),
            "batch": batch,
            "runs": runs,
            "preprocessing": asdict(manifest.preprocessing),
            "versions": {**versions(), "numpy": np.__version__},
        }
        with contextlib.ExitStack() as stack:
            journal = None
            try:
                journal = stack.enter_context(open_journal(key))
            except OSError as error:
                self.progress.stage(
                    f"Not resumable: the cache folder cannot be written ({error.strerror})"
                )
            yield journal

    def _resume(self, journal: Journal, table: Table, runs: Sequence[str]) -> None:
        for record in journal.records():
            # What could not be read may be there now, as after a mount had failed.
            if table.takes(record, runs):
                table.add(record)
        if table.images_done:
            self.progress.stage(f"Resuming: {table.images_done} of {table.images} images are done")


def evaluation_from_table(
    table: Table,
    source: Source,
    labels: Labels | None,
    candidates: Sequence[Candidate],
    classes: Classes | None,
    plain: Candidate | None,
    activation: Activation | None,
) -> Evaluation:
    """The content of ``eval.json``, from records and labels alone.

    Args:
        table: Every record.
        source: Where the images are from.
        labels: Class of each image of the table ``[B]``; None where there are none.
        candidates: What was run.
        classes: Of the model; None if it gives no classes.
        plain: The candidate that is not merged, if there is one.
        activation: Of the model's logits; None if it gives features.
    """
    from tome_export.runtime.environment import environment

    unreadable = tuple(UnreadableImage(name=n, reason=r) for n, r in table.unreadable())
    known = None if labels is None else labels[table.readable]
    return Evaluation(
        data=EvaluationData(
            source=source.text,
            kind=source.kind,
            images=int(np.count_nonzero(table.readable)),
            labelled=known is not None,
            unreadable=unreadable,
            unreadable_count=len(unreadable),
            notes=(
                *source.notes,
                *_measure_notes(labels, classes, activation),
                *_one_answer(table, classes, plain),
            ),
        ),
        classes=classes.count if classes is not None else None,
        candidates=tuple(
            _result(one, table, known, classes, plain, activation) for one in candidates
        ),
        confidence=CONFIDENCE,
        methods=METHODS,
        batch=table.batch,
        environment=environment(),
    )


def _measure_notes(
    labels: Labels | None, classes: Classes | None, activation: Activation | None
) -> Iterator[str]:
    """What a reader should know of the measure."""
    if activation == "none":
        yield (
            "the model gives numbers (a regression), not classes: labels are not used, and told is "
            "how far the numbers are from the unmerged model's"
        )
    if activation == "sigmoid" and classes is not None and classes.count > 2:
        same = "agreement is of all classes of an image, each of which has a yes or a no"
        top = "top-1 is of the class of the largest logit, as each image has one label"
        yield same if labels is None else f"{top}; {same}"


def _one_answer(table: Table, classes: Classes | None, plain: Candidate | None) -> Iterator[str]:
    """A note where agreement with the unmerged model could hardly fail."""
    if classes is None or plain is None:
        return
    found = table.values(plain.run)
    if len(found) > 1 and (found[:, 0] == found[0, 0]).all():
        yield (
            f"the unmerged model says the same of all {len(found)} images, so agreement with it "
            "says little"
        )


def _result(
    candidate: Candidate,
    table: Table,
    labels: Labels | None,
    classes: Classes | None,
    plain: Candidate | None,
    activation: Activation | None,
) -> CandidateResult:
    found = table.values(candidate.run)
    # A model against itself would be told as a finding, with an interval.
    other = plain is not None and plain.run != candidate.run
    base = table.values(plain.run) if plain is not None and other else None
    finite = np.isfinite(found).all(axis=1) if classes is None else found[:, 0] >= 0
    best = found[:, -TOP:]
    values: dict[str, Any] = {}
    if activation == "none":
        if base is not None:
            values["deviation_from_unmerged"] = deviations(found, base)
    elif activation == "sigmoid" and base is not None and found.shape[1] == 2 + TOP:
        # Images may all have one answer; their probabilities tell more.
        both = finite & (base[:, 0] >= 0)
        values["deviation_from_unmerged"] = deviations(found[both, 1:2], base[both, 1:2])
    if classes is None:
        cosines = found[finite]
        if activation is None and len(cosines) and other:
            summary = Cosines(mean=float(cosines.mean()), min=float(cosines.min()))
            values["cosine_to_unmerged"] = summary
    elif labels is not None:
        right = best[:, 0] == labels
        values["top1"] = share_of(right)
        if classes.count >= TOP5_FROM:
            values["top5"] = share_of((best == labels[:, None]).any(axis=1))
        if base is not None:
            values["difference_to_unmerged"] = paired_difference(right, base[:, -TOP] == labels)
    if classes is not None and base is not None:
        # An output that is not finite agrees with none, not with another such.
        values["agreement_with_unmerged"] = share_of((found[:, 0] == base[:, 0]) & finite)
    return CandidateResult(
        name=candidate.name,
        r=candidate.r,
        backend=candidate.backend,
        macs=candidate.macs,
        not_finite=int(np.count_nonzero(~finite)),
        **values,
    )
