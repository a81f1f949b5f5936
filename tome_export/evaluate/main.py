"""``tome-export eval``: accuracy of an artifact, against unmerged and against PyTorch."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tome_export.artifact import Artifact
from tome_export.artifact.environment import versions
from tome_export.artifact.evaluation import EVAL, Evaluation
from tome_export.data.decode import Task, decoded_chunks
from tome_export.data.find import source_of
from tome_export.data.labels import classes_of
from tome_export.data.source import Source, selection
from tome_export.errors import InputError, UsageError
from tome_export.evaluate.candidates import (
    UNMERGED,
    candidates_of,
    distinct,
    open_runners,
    portable,
)
from tome_export.evaluate.journal import Journal, open_journal
from tome_export.evaluate.measures import Comparison, evaluation_from_table
from tome_export.evaluate.records import Classifier, Record, RecordTable
from tome_export.merge.schedule import Schedule
from tome_export.progress import Progress, Silent
from tome_export.runtime.environment import cores
from tome_export.runtime.inputs import refuse_extra_inputs, refuse_videos
from tome_export.runtime.model import reference_model, rescheduled
from tome_export.runtime.registry import ORT_CPU, TORCH, require

if TYPE_CHECKING:
    from tome_export.patch import MergedModel

AGAINST = (UNMERGED, TORCH)


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
        against: Some of ``AGAINST``.
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
        from tome_export.evaluate.ray_cluster import require_ray

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
    progress.stage(f"Load {artifact.manifest.model.name}")
    model, _ = reference_model(artifact, request.weights)
    if classes is None:
        _check_comparable(artifact, model)
    with candidates_of(
        artifact, model, request.backend, request.against, request.r, progress
    ) as candidates:
        comparison = Comparison(
            candidates, classes, artifact.manifest.activation, artifact.manifest.output_kind
        )
        work = _Work(request, artifact, source, batch, comparison, progress)
        with work.table() as table:
            found = evaluation_from_table(table, source, work.labels, comparison)
            try:
                return EvalResult(artifact.record(EVAL, found), found)
            # The result stands also where it cannot be written down, as on a read-only mount.
            except InputError as error:
                return EvalResult(artifact, found, str(error))


def _batch(artifact: Artifact, request: EvalRequest) -> int:
    able = artifact.manifest.batch_on(request.backend)
    batch = able.opt if request.batch is None else request.batch
    if not able.min <= batch <= able.max:
        raise InputError(
            f"batch is {batch}; the artifact takes {able.min} to {able.max}, choose one of those "
            "or rebuild it with another --batch"
        )
    return batch


def _check_comparable(artifact: Artifact, model: MergedModel) -> None:
    """Features of all tokens that are left have another shape with every schedule."""
    from tome_export.patch.describe import output_shape

    merged, unmerged = (output_shape(m) for m in (model, rescheduled(model, Schedule(0))))
    if merged != unmerged:
        raise InputError(
            f"{artifact.path} gives features {list(merged)} per image, and {list(unmerged)} "
            "without merging, which do not compare; build it with --dense to compare features "
            "patch by patch"
        )


class _Work:
    """Chunks of images to a table of records, journal between them.

    Attributes:
        labels: Class of each image that is taken ``[B]``; None where there are none.
    """

    def __init__(
        self,
        request: EvalRequest,
        artifact: Artifact,
        source: Source,
        batch: int,
        comparison: Comparison,
        progress: Progress,
    ) -> None:
        manifest, plain = artifact.manifest, comparison.plain
        if comparison.classes is None and plain is None:
            raise UsageError(
                "the model has no classes, so that all there is to tell is how near it is to the "
                "unmerged one; add unmerged to --against"
            )
        self._request, self._manifest, self._progress = request, manifest, progress
        self._source, self._chosen = source, selection(len(source), request.limit)
        self._runs = distinct(comparison.candidates)
        self._classifier = Classifier(
            batch,
            manifest.output.name,
            manifest.activation,
            plain.run if plain else "",
            manifest.output_kind,
        )
        known = None if comparison.classes is None else source.labels
        self.labels = None if known is None else known[self._chosen]

    @contextlib.contextmanager
    def table(self) -> Iterator[RecordTable]:
        """Run every chunk that is not in the journal yet; all results are computed from the table.

        The journal is deleted when the block ends without an error: what fails in there, as for
        want of memory or space, does not cost the work.
        """
        images, models = len(self._chosen), len(self._runs)
        table = RecordTable(images, self._classifier.batch)
        with self._journal() as journal:
            self._resume(journal, table)
            if table.missing():
                self._progress.stage(
                    f"Classify {images} images, {models} model{'s' if models > 1 else ''}"
                )
                with self._records(table) as records:
                    for record in records:
                        journal.append(record)
                        table.add(record)
                        self._progress.step("images", table.images_done, images)
            if not table.readable.any():
                # Whatever made them unreadable, as a mount that was not there, may have gone.
                journal.remove()
            table.require_images()
            yield table
            journal.remove()

    @contextlib.contextmanager
    def _records(self, table: RecordTable) -> Iterator[Iterator[Record]]:
        """Records as they come; closed at once when the block ends, also by an interrupt."""
        from tome_export.data.preprocess import pixels_from_bytes

        decode = partial(pixels_from_bytes, preprocessing=self._manifest.preprocessing)
        batch, request = self._classifier.batch, self._request
        tasks = (
            Task(n, tuple(self._source.items(self._chosen[n * batch : (n + 1) * batch])))
            for n in table.missing()
        )
        with contextlib.ExitStack() as stack:
            if request.ray is not None:
                from tome_export.evaluate.ray_cluster import RayWork, ray_records

                opener, roots = portable(self._runs), self._source.roots
                work = RayWork(list(tasks), decode, opener, self._classifier, roots)
                yield stack.enter_context(
                    contextlib.closing(ray_records(work, request.ray, cores()))
                )
                return
            runners = stack.enter_context(open_runners(self._runs, self._progress))
            workers = cores() if request.workers is None else request.workers
            workers = 0 if self._source.kind == "samples" else workers
            chunks = stack.enter_context(contextlib.closing(decoded_chunks(tasks, decode, workers)))
            yield (self._classifier.record(chunk, runners) for chunk in chunks)

    @contextlib.contextmanager
    def _journal(self) -> Iterator[Journal]:
        """The journal; a passing one where it cannot be kept, as with a home that is read-only."""
        manifest = self._manifest
        key = {
            "files": {
                name: file.model_dump(mode="json")
                for name, file in manifest.files.items()
                if not name.endswith(".json")
            },
            "weights": manifest.model.weights.state_sha256,
            "activation": manifest.activation,
            "data": self._source.digest,
            "limit": len(self._chosen),
            "batch": self._classifier.batch,
            "runs": list(self._runs),
            "preprocessing": asdict(manifest.preprocessing),
            "versions": {**versions(), "numpy": np.__version__},
        }
        with contextlib.ExitStack() as stack:
            try:
                journal = stack.enter_context(open_journal(key))
            except OSError as error:
                self._progress.stage(
                    f"Not resumable: the cache folder cannot be written ({error.strerror})"
                )
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tome-export-"))
                journal = stack.enter_context(contextlib.closing(Journal(Path(folder) / "journal")))
            yield journal

    def _resume(self, journal: Journal, table: RecordTable) -> None:
        if self._request.restart:
            journal.clear()
        for record in journal.records():
            # What could not be read may be there now, as after a mount had failed.
            if table.takes(record, self._runs):
                table.add(record)
        if table.images_done:
            self._progress.stage(f"Resuming: {table.images_done} of {table.images} images are done")
