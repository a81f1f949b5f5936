"""``tome-export predict``: labels, features or dense maps of images, by an artifact alone."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.artifact import Artifact, Manifest, staged, write_json, writing_to
from tome_export.artifact.evaluation import UnreadableImage
from tome_export.artifact.files import check_new_file, write_whole
from tome_export.artifact.pictures import names_of, pictures_of
from tome_export.data.answers import ImageAnswer, Label, labels_from_logits, names_of_classes
from tome_export.data.decode import Task, decoded_chunks
from tome_export.data.images import input_items
from tome_export.data.preprocess import find_images, find_videos, is_video, pixels_from_bytes
from tome_export.data.scores import TOP_K
from tome_export.display import counted
from tome_export.errors import InputError, UsageError
from tome_export.predict.pictures import class_map, is_picture, picture_of
from tome_export.progress import Progress, Silent
from tome_export.runtime.environment import cores
from tome_export.runtime.inputs import asked_inputs, inputs_from_file
from tome_export.runtime.load import LoadedArtifact, check_runs_artifacts, check_top
from tome_export.runtime.registry import ORT_CPU

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Outputs = Mapping[str, NDArray[Any]]

SUMMARY = "predict.json"


@dataclass(frozen=True)
class PredictRequest:
    """What to predict.

    Attributes:
        artifact: The artifact directory.
        images: Image files, or video files for a model of videos, and folders of such.
        backend: What runs the model.
        top: Labels per image, of a classifier.
        output: File for features, as ``numpy.save`` writes it, or folder for the pictures of dense
            maps; None to write nothing.
        raw: Write the values of dense maps beside their pictures.
        force: Replace a file, or a folder that an earlier run wrote.
        query: File of what the model takes besides images; see ``inputs.inputs_from_file``.
    """

    artifact: Path
    images: Sequence[Path]
    backend: str = ORT_CPU
    top: int = TOP_K
    output: Path | None = None
    raw: bool = False
    force: bool = False
    query: Path | None = None


@dataclass(frozen=True)
class MapAnswer:
    """The dense output of one image.

    Attributes:
        image: The image file.
        shape: Shape of the output.
        low: Its lowest value, black in a picture of one channel.
        high: Its highest, white in it.
        labels: Of several channels those that are the largest somewhere, with the share of the map
            where they are as their score, largest first; None of one channel.
        file: Name of its picture in the output folder; None where nothing was written.
        raw: Name of the file with its values; None where that was not asked for.
    """

    image: Path
    shape: tuple[int, ...]
    low: float
    high: float
    labels: list[Label] | None
    file: str | None = None
    raw: str | None = None


@dataclass(frozen=True)
class PredictResult:
    """What an artifact says of images.

    Attributes:
        artifact: The artifact.
        backend: What ran it.
        answers: Those of the images that could be used, in their order. They hold no features where
            these are in the file.
        shape: Shape of what is in the file: a row per image given, of NaN for one that failed.
        output: The file or folder that was written; None for none.
        failed: The other images: those that cannot be read, or of which the output is not finite.
    """

    artifact: Artifact
    backend: str
    answers: tuple[ImageAnswer | MapAnswer, ...]
    output: Path | None
    shape: tuple[int, ...] | None = None
    failed: tuple[UnreadableImage, ...] = field(default=())


def predict(request: PredictRequest, progress: Progress | None = None) -> PredictResult:
    """Run an artifact on images, with its own preprocessing.

    An image that cannot be read costs the others nothing.

    Raises:
        UsageError: if ``top`` is out of range, the backend is none, a query is missing or too many,
            or ``output`` or ``raw`` is given for a model that has nothing to write.
        InputError: if the artifact is not usable, an image does not exist, none can be used, or the
            output exists or cannot be written.
        MissingComponentError: if the backend, or what decodes videos, is not here.
        ExportError: if the model fails.
    """
    progress = progress or Silent()
    check_top(request.top)
    check_runs_artifacts(request.backend)
    progress.stage("Verify the artifact")
    artifact = Artifact.open(request.artifact.absolute())
    manifest = artifact.manifest
    _check_output(request, manifest)
    paths = _files(manifest, request.images)
    further = inputs_from_file(asked_inputs(manifest), request.query, len(paths))
    answers: list[ImageAnswer | MapAnswer] = []
    failed: list[UnreadableImage] = []
    rows: list[NDArray[Any] | None] = []
    output = request.output
    with ExitStack() as stack:
        folder: Path | None = None
        if output is not None and manifest.output_kind == "map":
            ours = pictures_of(SUMMARY, "predict")
            folder = stack.enter_context(staged(output, force=request.force, replaceable=ours))
        progress.stage(f"Load {manifest.model.name}")
        model = stack.enter_context(LoadedArtifact(artifact, request.backend, progress))
        progress.stage(f"Run {counted(len(paths), 'video' if manifest.video else 'image')}")
        names = names_of(paths)
        for index, found in enumerate(_outputs(model, paths, further, progress)):
            if isinstance(found, str):
                failed.append(UnreadableImage(name=str(paths[index]), reason=found))
                rows.append(None)
                continue
            values = found[manifest.output.name]
            if manifest.output_kind == "classes":
                (labels,) = labels_from_logits(manifest, values[None], request.top)
                answers.append(ImageAnswer(paths[index], labels))
            elif manifest.output_kind == "map":
                answers.append(
                    _map(manifest, paths[index], values, folder, names[index], request.raw)
                )
            elif output is None:
                answers.append(ImageAnswer(paths[index], None, dict(found)))
            else:
                answers.append(ImageAnswer(paths[index], None))
                rows.append(values)
        if not answers:
            raise InputError(
                f"none of {len(paths)} images could be used; the first is {failed[0].name}: "
                f"{failed[0].reason}"
            )
        if folder is not None:
            write_json(folder / SUMMARY, _summary(manifest, answers))
    shape = None
    if output is not None and folder is None:
        shape = _write_features(output, rows)
    return PredictResult(artifact, request.backend, tuple(answers), output, shape, tuple(failed))


def _check_output(request: PredictRequest, manifest: Manifest) -> None:
    """Refuse what cannot be written, before any work."""
    kind, output, shape = manifest.output_kind, request.output, manifest.output.shape[1:]
    if request.raw and (kind != "map" or output is None):
        raise UsageError("--raw is for the pictures of a dense map; give --output FOLDER for one")
    if output is None:
        return
    if kind == "classes":
        raise UsageError(
            f"--output is {output}, but the model gives labels, which are printed; leave it out"
        )
    if kind == "features":
        check_new_file(output, force=request.force)
    elif not is_picture([int(size) for size in shape]):
        raise InputError(
            f"the model gives {manifest.output.name} {[*shape]} per image, of which no picture can "
            "be made; leave --output out, or read it in Python by tome_export.load"
        )


def _files(manifest: Manifest, given: Sequence[Path]) -> list[Path]:
    """The files that are named, and those of the model's kind in folders."""
    find = find_videos if manifest.video else find_images
    paths = [path for place in given for path in find(place)]
    for path in paths:
        if is_video(path) != (manifest.video is not None):
            other, kind = ("a video", "images") if is_video(path) else ("no video", "videos")
            raise InputError(f"{path} is {other}, and the model takes {kind}")
    return paths


def _outputs(
    model: LoadedArtifact,
    paths: Sequence[Path],
    further: Outputs,
    progress: Progress,
) -> Iterator[Outputs | str]:
    """Of each image its outputs by name, or why there are none; images are decoded ahead."""
    manifest = model.artifact.manifest
    items, batch = input_items(manifest, paths), model.batch.opt
    starts = range(0, len(paths), batch)
    tasks = [Task(n, tuple(items[start : start + batch])) for n, start in enumerate(starts)]
    decode = partial(pixels_from_bytes, preprocessing=manifest.preprocessing)
    workers = 0 if len(tasks) == 1 else min(cores(), len(tasks))
    with closing(decoded_chunks(tasks, decode, workers)) as chunks:
        for chunk, start in zip(chunks, starts, strict=True):
            count = len(tasks[chunk.chunk].items)
            reasons = {position: reason for position, _, reason in chunk.unreadable}
            kept = [position for position in range(count) if position not in reasons]
            outputs: Outputs = {}
            if kept:
                given = {name: rows[start:][kept] for name, rows in further.items()}
                outputs = model.run(chunk.pixels, **given)
            for position in range(count):
                if position in reasons:
                    yield reasons[position]
                    continue
                row = kept.index(position)
                one = {name: array[row] for name, array in outputs.items()}
                finite = np.isfinite(one[manifest.output.name]).all()
                yield one if finite else "what the model gives of it is not finite"
            progress.step("images", start + count, len(paths))


def _map(
    manifest: Manifest, image: Path, values: NDArray[Any], folder: Path | None, name: str, raw: bool
) -> MapAnswer:
    """A dense output, and its files where there is a folder for them."""
    classes = class_map(values) if is_picture(values.shape) else None
    file, array = f"{name}.png", f"{name}.npy"
    if folder is not None:
        picture_of(values).save(folder / file, optimize=True)
        if raw:
            np.save(folder / array, values, allow_pickle=False)
    return MapAnswer(
        image,
        values.shape,
        float(values.min()),
        float(values.max()),
        None if classes is None else _shares(manifest, classes),
        None if folder is None else file,
        array if raw else None,
    )


def _shares(manifest: Manifest, classes: NDArray[np.int64]) -> list[Label]:
    """The classes of a map ``[H, W]`` of them, largest first, by their share of it."""
    shares = np.bincount(classes.reshape(-1)) / classes.size
    names = names_of_classes(manifest)
    order = np.argsort(-shares, kind="stable")[: np.count_nonzero(shares)]
    return [Label(names[i], float(shares[i]), i) for i in order.tolist()]


def _summary(manifest: Manifest, answers: Sequence[Any]) -> dict[str, Any]:
    """What ``predict.json`` says of the pictures beside it."""
    pictures = [
        {key: value for key, value in asdict(one).items() if value is not None} for one in answers
    ]
    return {
        "model": manifest.model.name,
        "random_weights": manifest.model.random_weights,
        "output": manifest.output.name,
        "pictures": [{**one, "image": str(one["image"])} for one in pictures],
    }


def _write_features(output: Path, rows: Sequence[NDArray[Any] | None]) -> tuple[int, ...]:
    """Write a row per image, of NaN where there is none; returns the shape."""
    known = next(row for row in rows if row is not None)
    nothing = np.full_like(known, np.nan)
    array = np.stack([nothing if row is None else row for row in rows])
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    with writing_to(output, "file"):
        write_whole(output, content.getvalue())
    shape: tuple[int, ...] = array.shape
    return shape
