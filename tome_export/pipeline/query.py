"""Ask a running server about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError, UsageError
from tome_export.pipeline.progress import Progress, Silent
from tome_export.serve.client import IMAGE, Client, Protocol, connect

if TYPE_CHECKING:
    from numpy.typing import NDArray

LABEL_OUTPUTS = {"label", "score", "index"}


@dataclass(frozen=True)
class QueryRequest:
    """What to ask.

    Attributes:
        url: See ``tome_export.serve.client.connect``.
        images: Image files, and folders of them.
        model: Model, or its pipeline; None for the only pipeline of the server.
        protocol: ``grpc``, ``http``, or None for the scheme's, else gRPC.
        top: Labels per image; None for all that the server gives.
        shared_memory: Hand the images over in shared memory: server on this machine only.
    """

    url: str
    images: Sequence[Path]
    model: str | None = None
    protocol: Protocol | None = None
    top: int | None = None
    shared_memory: bool = False


@dataclass(frozen=True)
class Label:
    """One of the best classes.

    Attributes:
        label: Its name; empty if the model has none.
        score: Its probability.
        index: Its row of the logits.
    """

    label: str
    score: float
    index: int


@dataclass(frozen=True)
class ImageAnswer:
    """What the server says about one image.

    Attributes:
        image: The file.
        labels: Best first; None from a tower.
        features: The tower's output by name, without batch; empty from a classifier.
    """

    image: Path
    labels: list[Label] | None
    features: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class QueryResult:
    """Answers in the order of the images.

    Attributes:
        address: ``host:port`` of the server.
        protocol: ``grpc`` or ``http``.
        model: The model that answered.
    """

    address: str
    protocol: Protocol
    model: str
    answers: list[ImageAnswer]


def query(request: QueryRequest, progress: Progress | None = None) -> QueryResult:
    """Send encoded images to a server and read its labels or features.

    Every file is looked at first, so that a bad one costs no half of the answers.

    Raises:
        UsageError: if ``top`` is not positive or the URL is not one.
        InputError: if an image is unreadable, or the server has no such model or refuses.
        MissingComponentError: if no server answers.
    """
    progress = progress or Silent()
    if request.top is not None and request.top < 1:
        raise UsageError(f"top is {request.top}; expected 1 or more")
    images = _read(request.images)
    progress.stage(f"Ask {request.url} about {len(images)} image{'s' * (len(images) != 1)}")
    with connect(request.url, request.protocol) as client:
        model = client.pipeline(request.model)
        progress.detail(f"model {model} over {client.protocol}")
        rank = len(client.tensors(model)[0][IMAGE]["shape"])
        answers = []
        for count, (path, data) in enumerate(images, 1):
            outputs = _ask(client, model, path, data, rank, shared_memory=request.shared_memory)
            answers.append(_answer(path, outputs, request.top))
            progress.detail(f"images: {count}/{len(images)}")
        return QueryResult(client.address, client.protocol, model, answers)


def _read(given: Sequence[Path]) -> list[tuple[Path, bytes]]:
    from tome_export.models.preprocess import find_images, read_image

    paths = [path for place in given for path in find_images(place)]
    for path in paths:
        read_image(path)  # says what is wrong with it
    return [(path, path.read_bytes()) for path in paths]


def _ask(
    client: Client, model: str, path: Path, data: bytes, rank: int, *, shared_memory: bool
) -> dict[str, NDArray[Any]]:
    import numpy as np

    image = np.empty([1] * rank, dtype=np.object_)
    image[...] = data
    try:
        return client.infer(model, {IMAGE: image}, shared_memory=shared_memory)
    except InputError as error:
        raise InputError(f"image {path}: {error}") from error


def _answer(path: Path, outputs: dict[str, NDArray[Any]], top: int | None) -> ImageAnswer:
    """Outputs ``[1, ...]`` of one image."""
    if not set(outputs) >= LABEL_OUTPUTS:
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
    return ImageAnswer(path, labels[:top], {})
