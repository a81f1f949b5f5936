"""The work of an evaluation: chunks of images to a table of records, journal between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.artifact import Artifact
from tome_export.errors import InputError
from tome_export.evaluation.classify import Classifier
from tome_export.evaluation.journal import Journal, open_journal
from tome_export.evaluation.records import Record, Table, Task
from tome_export.evaluation.source import Source
from tome_export.pipeline.eval_runs import Candidate, open_runs, shipment_of
from tome_export.pipeline.manifest import versions
from tome_export.progress import Progress

if TYPE_CHECKING:
    from tome_export.pipeline.eval import EvalRequest


@contextlib.contextmanager
def evaluated(
    request: EvalRequest,
    artifact: Artifact,
    source: Source,
    chosen: np.ndarray[Any, np.dtype[np.int64]],
    candidates: Sequence[Candidate],
    classifier: Classifier,
    cores: int,
    progress: Progress,
) -> Iterator[Table]:
    """Run every chunk that is not in the journal yet; all that follows is computed from the table.

    The journal is deleted when the block ends without an error: what fails in there, as for want
    of memory or space, does not cost the work.

    Args:
        request: Where and how to run.
        artifact: What is evaluated.
        source: All images.
        chosen: Indices of those to take ``[B]``.
        candidates: What to run.
        classifier: What to keep.
        cores: Cores to use of this machine.
        progress: Told of each chunk.

    Raises:
        InputError: if no image can be read, or the same evaluation is running already.
        ExportError: if a model fails.
    """
    from tome_export.models.preprocess import pixels_from_bytes

    preprocessing = artifact.manifest.preprocessing
    decode = partial(pixels_from_bytes, preprocessing=preprocessing)
    batch = classifier.batch
    runs = list(dict.fromkeys(candidate.run for candidate in candidates))
    table = Table(len(chosen), batch, runs, classes=classifier.classes)
    key = {
        "files": artifact.manifest.files,
        "weights": artifact.manifest.model.weights.state_sha256,
        "data": source.digest,
        "limit": len(chosen),
        "batch": batch,
        "runs": runs,
        "preprocessing": preprocessing.to_dict(),
        "versions": {**versions(), "numpy": np.__version__},
    }
    key["files"] = {n: f for n, f in key["files"].items() if not n.endswith(".json")}

    def tasks() -> Iterator[Task]:
        for chunk in np.flatnonzero(~table.done):
            part = chosen[chunk * batch : (chunk + 1) * batch]
            yield Task(int(chunk), tuple(source.item(int(index)) for index in part))

    with _journal(key, progress) as journal:
        if journal is not None:
            journal.clear() if request.restart else _resume(journal, table, progress)
        if not table.done.all():
            count = len(runs)
            progress.stage(
                f"Classify {len(chosen)} images, {count} model{'s' if count > 1 else ''}"
            )
            with _records(
                request, source, tasks, decode, candidates, classifier, cores, progress
            ) as new:
                for record in new:
                    if journal is not None:
                        journal.append(record)
                    table.add(record)
                    progress.step("images", table.images_done, len(chosen))
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
def _records(
    request: EvalRequest,
    source: Source,
    tasks: Callable[[], Iterator[Task]],
    decode: Any,
    candidates: Sequence[Candidate],
    classifier: Classifier,
    cores: int,
    progress: Progress,
) -> Iterator[Iterator[Record]]:
    """Records as they come; closed at once when the block ends, also by an interrupt."""
    with contextlib.ExitStack() as stack:
        if request.ray is not None:
            from tome_export.evaluation.ray_data import ray_records

            opener = shipment_of(candidates).open
            found = ray_records(
                list(tasks()), decode, opener, classifier, request.ray, cores, source.roots
            )
        else:
            from tome_export.evaluation.local import local_records

            runners = stack.enter_context(open_runs(candidates, progress))
            workers = cores if request.workers is None else request.workers
            workers = 0 if source.kind == "samples" else workers
            found = local_records(tasks(), decode, workers, runners, classifier)
        yield stack.enter_context(contextlib.closing(found))


@contextlib.contextmanager
def _journal(key: dict[str, Any], progress: Progress) -> Iterator[Journal | None]:
    """The journal; None where it cannot be written, as with a home that is read-only."""
    with contextlib.ExitStack() as stack:
        journal = None
        try:
            journal = stack.enter_context(open_journal(key))
        except OSError as error:
            progress.stage(f"Not resumable: the cache folder cannot be written ({error.strerror})")
        yield journal


def _resume(journal: Journal, table: Table, progress: Progress) -> None:
    for record in journal.records():
        # What could not be read may be there now, as after a mount had failed.
        if not record.unreadable:
            table.add(record)
    if table.images_done:
        progress.stage(f"Resuming: {table.images_done} of {table.images} images are done")
