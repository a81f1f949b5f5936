"""``tome-export query``: ask a running server about images or videos."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.data.answers import ImageAnswer, Label
from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.progress import Progress, Silent
from tome_export.runtime.inputs import inputs_from_file
from tome_export.serve.client import Protocol, connect, encoded_file
from tome_export.serve.names import IMAGE, PIPELINE, PREPROCESS, VIDEO
from tome_export.spec import INPUT_NAME, ImageSize

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tome_export.serve.client import Client


@dataclass(frozen=True)
class QueryRequest:
    """What to ask.

    Attributes:
        url: See ``tome_export.serve.client.connect``.
        images: Image or video files, as the model takes, and folders of such.
        model: Model, router or pipeline; None for the router of pipelines, or the only pipeline.
        protocol: ``grpc``, ``http``, or None for the scheme's, else gRPC.
        top: Labels per image; None for all that the server gives.
        shared_memory: Hand the images over in shared memory: server on this machine only.
        r: Most tokens to merge per layer, for a router.
        max_ms: Longest that one image may take the model, in ms, for a router.
        size: Image size that all images go to, for a router of several.
        query: File of what the model takes besides images; see ``inputs.inputs_from_file``.
    """

    url: str
    images: Sequence[Path]
    model: str | None = None
    protocol: Protocol | None = None
    top: int | None = None
    shared_memory: bool = False
    r: int | None = None
    max_ms: float | None = None
    size: ImageSize | None = None
    query: Path | None = None


@dataclass(frozen=True)
class QueryResult:
    """Answers in the order of the images, and which server and model gave them."""

    address: str
    protocol: Protocol
    model: str
    answers: list[ImageAnswer]


def query(request: QueryRequest, progress: Progress | None = None) -> QueryResult:
    """Send encoded images to a server and read its labels or features.

    Every file is looked at first, so that a bad one costs no half of the answers.

    Raises:
        UsageError: if ``top``, ``r`` or ``max_ms`` is out of its range, both of the latter are
            given, the URL is not one, or a query is missing or too many.
        InputError: if an image is unreadable, the server has no such model or refuses, or ``r``,
            ``max_ms`` or ``size`` is given for a model that is no router.
        MissingComponentError: if no server answers.
    """
    progress = progress or Silent()
    if request.top is not None and request.top < 1:
        raise UsageError(f"top is {request.top}; expected 1 or more")
    parameters = {**_budget(request.r, request.max_ms)}
    if request.size is not None:
        parameters["size"] = str(request.size)
    with connect(request.url, request.protocol) as client:
        model = client.pipeline(request.model)
        if parameters and not client.routes(model):
            raise InputError(
                f"model {model} at {client.address} is no router, which is what --r, --max-ms and "
                "--size are for; leave them out, or serve several artifacts of one model together, "
                "with --preprocess"
            )
        tensors = client.tensors(model)[0]
        kind = VIDEO if VIDEO in tensors else IMAGE
        images = _read(model, kind, request.images, _frames(client, model) if kind == VIDEO else 1)
        progress.stage(f"Ask {request.url} about {len(images)} {kind}{'s' * (len(images) != 1)}")
        progress.detail(f"model {model} over {client.protocol}")
        # What is in front is the batch: -1, or that of a model of fixed batch.
        shapes = {n: tuple(t["shape"][1:]) for n, t in tensors.items() if n != kind}
        further = inputs_from_file(shapes, request.query, len(images))
        answers = []
        for count, (path, data) in enumerate(images, 1):
            one = {name: rows[count - 1 : count] for name, rows in further.items()}
            image = encoded_file(data, tensors[kind]["datatype"], len(tensors[kind]["shape"]))
            try:
                outputs = client.infer(
                    model,
                    {kind: image, **one},
                    shared_memory=request.shared_memory,
                    parameters=parameters,
                )
            except InputError as error:
                raise InputError(f"{kind} {path}: {error}") from error
            answers.append(_answer(path, outputs, request.top))
            progress.step(f"{kind}s", count, len(images))
        return QueryResult(client.address, client.protocol, model, answers)


def _frames(client: Client, model: str) -> int:
    """Frames of a video that the server takes; 1 where it has no decoder that says so."""
    one, *_ = client.routes(model) or (model,)
    decoder = f"{one.removesuffix(PIPELINE)}{PREPROCESS}"
    if decoder not in client.models():
        return 1
    # [batch, frames, channels, height, width]
    frames: int = client.tensors(decoder)[1][INPUT_NAME]["shape"][1]
    return frames


def _read(model: str, kind: str, given: Sequence[Path], frames: int) -> list[tuple[Path, bytes]]:
    """The files to send: those named, and those of the model's kind in folders."""
    from tome_export.data.pixels import SERVED_FORMATS
    from tome_export.data.preprocess import (
        find_images,
        find_videos,
        is_video,
        read_frames,
        read_image,
    )

    find = find_videos if kind == VIDEO else find_images
    paths = [path for place in given for path in find(place)]
    for path in paths:
        if is_video(path) != (kind == VIDEO):
            other = "an image" if kind == VIDEO else "a video"
            raise InputError(f"{path} is {other}, and model {model} takes {kind}s")
    for path in paths:
        # Says what is wrong with it.
        if kind == IMAGE:
            read_image(path, SERVED_FORMATS)
            continue
        # The server decodes: a client needs no decoder of its own.
        with contextlib.suppress(MissingComponentError):
            read_frames(path, frames)
    return [(path, path.read_bytes()) for path in paths]


def _budget(r: int | None, max_ms: float | None) -> Mapping[str, str | int]:
    if r is not None and max_ms is not None:
        raise UsageError("both r and max-ms are given; give one of them")
    for name, value in (("r", r), ("max-ms", max_ms)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name} is {value:g}; expected a number, 0 or more")
    if r is not None:
        return {"r": r}
    # As text: requests have no parameters with fractions.
    return {} if max_ms is None else {"max_ms": str(max_ms)}


def _answer(path: Path, outputs: dict[str, NDArray[Any]], top: int | None) -> ImageAnswer:
    """Outputs ``[1, ...]`` of one image."""
    if not {"label", "score", "index"} <= outputs.keys():
        return ImageAnswer(path, None, {name: array[0] for name, array in outputs.items()})
    names, scores, indices = (outputs[name].reshape(-1) for name in ("label", "score", "index"))
    if top is not None and top > len(scores):
        raise InputError(
            f"top is {top}, but the server gives the best {len(scores)} labels; ask for at most "
            "that many"
        )
    labels = [
        Label(name.decode("utf-8", "replace"), float(score), int(index))
        for name, score, index in zip(names, scores, indices, strict=True)
    ]
    return ImageAnswer(path, labels[:top])
