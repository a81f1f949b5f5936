"""``tome-export report``: everything an artifact holds, as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tome_export.artifact import Artifact, Manifest, writing_to
from tome_export.artifact.bench import BENCH, Bench
from tome_export.artifact.evaluation import EVAL, Evaluation
from tome_export.artifact.files import utf8, write_whole
from tome_export.artifact.parity import PARITY, ParityFile
from tome_export.artifact.schedule import SCHEDULE, read_search
from tome_export.data.images import load_inputs
from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.progress import Progress, Silent
from tome_export.report.page import MOST_BYTES, NAME, Content, render, sections_of
from tome_export.runtime.merge_maps import MergeMap, merge_maps

if TYPE_CHECKING:
    from numpy.typing import NDArray

Document = TypeVar("Document")

MOST_PICTURES = 12
"""Images on a page: more make it larger than a page should be."""

SAMPLES = 4
"""Sample images where no number is given."""


@dataclass(frozen=True)
class ReportRequest:
    """What to write.

    Attributes:
        artifact: The artifact directory.
        images: Image files to show with their merged tokens, before the samples.
        output: The file; None for ``report.html`` in the artifact, which then records it.
        samples: Images of those that come along to show as well.
    """

    artifact: Path
    images: tuple[Path, ...] = ()
    output: Path | None = None
    samples: int = SAMPLES


@dataclass(frozen=True)
class ReportResult:
    """What was written.

    Attributes:
        artifact: The artifact, with the page in its manifest where it lies in there.
        path: The page.
        size: Its bytes.
        pictures: Names of the images that it shows.
        missing: Title of each section without data -> the command that adds it.
        note: Why there are no pictures; None if there are, or none were asked for.
        changed: Results left out because they are not as they were recorded, and what to do.
    """

    artifact: Artifact
    path: Path
    size: int
    pictures: tuple[str, ...]
    missing: dict[str, str]
    note: str | None
    changed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "artifact": str(self.artifact.path),
            "random_weights": self.artifact.manifest.model.random_weights,
            "report": str(self.path),
            "bytes": self.size,
            "pictures": list(self.pictures),
            "missing": self.missing,
            "note": self.note,
            "changed": list(self.changed),
        }


def report(request: ReportRequest, progress: Progress | None = None) -> ReportResult:
    """Write the page of an artifact.

    Raises:
        UsageError: if more images are asked for than a page shows.
        InputError: if the artifact is damaged, one of its reports is not usable, an image cannot
            be read, or the page cannot be written.
        MissingComponentError: if images are given and there is no ONNX Runtime to run them.
    """
    progress = progress or Silent()
    _check_count(request)
    _check_output(request)
    progress.stage("Verify the artifact")
    artifact = Artifact.open(request.artifact.absolute())
    content = Content(
        artifact.path.resolve().name,
        artifact.manifest,
        parity=_read(artifact, PARITY, ParityFile.read),
        bench=_read(artifact, BENCH, Bench.read),
        evaluation=_read(artifact, EVAL, Evaluation.read),
        schedule=_read(artifact, SCHEDULE, read_search),
    )
    progress.stage("Find the merged tokens")
    maps, names, note = _maps(artifact, request, progress)
    progress.stage("Write the page")
    content = replace(content, maps=maps, names=names, no_pictures=note)
    page = utf8(render(content))
    if len(page) >= MOST_BYTES:
        raise InputError(
            f"the page would have {len(page)} bytes, expected less than {MOST_BYTES}; give fewer "
            "images, or fewer --samples"
        )
    path = request.output.absolute() if request.output else artifact.path / NAME
    artifact = _write(artifact, path, page)
    missing = {s.title: s.command for s in sections_of(content) if s.command}
    changed = tuple(why for name, why in artifact.stale.items() if name != NAME)
    return ReportResult(artifact, path, len(page), tuple(names), missing, note, changed)


def _check_count(request: ReportRequest) -> None:
    if request.samples < 0:
        raise UsageError(f"samples are {request.samples}; expected 0 or more")
    total = request.samples + len(request.images)
    if total > MOST_PICTURES:
        raise UsageError(
            f"{total} images were asked for; a page shows at most {MOST_PICTURES}, give fewer or "
            "lower --samples"
        )


def _check_output(request: ReportRequest) -> None:
    output = request.output
    if output is None:
        return
    if output.is_dir():
        raise InputError(f"{output} is a folder; give a file for the page, such as {NAME}")
    if output.exists() and not output.is_file():
        raise InputError(f"{output} is a device, pipe or socket; give a file for the page")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output.parent} does not exist; make it, or give another file")
    folder, place = request.artifact.resolve(), output.parent.resolve() / output.name
    if place.is_relative_to(folder) and place != folder / NAME:
        raise InputError(
            f"{output} is inside the artifact, where the page is called {NAME}; leave out "
            "--output, or give a file elsewhere"
        )


def _read(
    artifact: Artifact, name: str, reader: Callable[[Path], Document | None]
) -> Document | None:
    return reader(artifact.path / name) if name in artifact.manifest.files else None


def _maps(
    artifact: Artifact, request: ReportRequest, progress: Progress
) -> tuple[Sequence[MergeMap], Sequence[str], str | None]:
    """Merged tokens of the user's images and of the samples, and what the images are called."""
    pixels, names = _samples(artifact.manifest, request.samples)
    names = [*(path.name for path in request.images), *names]
    if not names:
        return (), (), None
    if request.images:
        given = load_inputs(artifact.manifest, request.images)
        pixels = np.concatenate([given, pixels])
    try:
        return merge_maps(artifact, pixels, progress), names, None
    except (InputError, MissingComponentError) as error:
        if request.images:
            raise
        # Samples are an extra: what else there is to say does not wait for them.
        return (), (), str(error)


def _samples(manifest: Manifest, count: int) -> tuple[NDArray[np.float32], list[str]]:
    """The first of the images that come along, as the model takes them, and their names."""
    from tome_export.data.preprocess import load_images
    from tome_export.data.samples import digits_test, moving_samples, sample_paths

    if manifest.model.name == "vit_digits":
        digits, labels = digits_test(manifest.preprocessing)
        return digits[:count], [f"digit {n}, test image {i}" for i, n in enumerate(labels[:count])]
    paths = sample_paths()
    if count > len(paths):
        raise UsageError(
            f"{count} samples were asked for; there are {len(paths)} photographs, lower --samples"
        )
    names = [path.stem.replace("_", " ") for path in paths[:count]]
    shape = tuple(int(size) for size in manifest.input.shape[1:])
    if not count:
        return np.empty((0, *shape), manifest.input.dtype), []
    if manifest.video:
        moving: NDArray[np.float32] = moving_samples(manifest.preprocessing, count, shape[0])
        return moving, [f"{name}, moving" for name in names]
    return load_images(paths[:count], manifest.preprocessing), names


def _write(artifact: Artifact, path: Path, page: bytes) -> Artifact:
    """Put the page into place in one step; one inside the artifact goes into its manifest."""
    if path.parent.resolve() == artifact.path.resolve():  # then it is report.html
        return artifact.record(path.name, page)
    with writing_to(path.parent):
        write_whole(path, page)
    return artifact
