"""Models of a repository tried out before anybody gets to see them: a server answers one image."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tome_export.errors import ExportError, InputError, MissingComponentError
from tome_export.serve.client import Client, connect, encoded_file
from tome_export.serve.config import ModelFolder
from tome_export.serve.names import IMAGE, ROUTES, VIDEO
from tome_export.serve.server import RunRequest, running
from tome_export.spec import INPUT_NAME
from tome_export.video.sample import sample_video

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tritonclient.grpc.model_config_pb2 import ModelConfig

READY_SECONDS = 600.0
"""Most time to load the models; a server that cannot load one ends before."""

SIZE = 32
"""Height and width of the image in pixels."""


def sample_image() -> bytes:
    """A PNG file of a few hundred bytes."""
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((SIZE, SIZE)).convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def sample_request(folders: Sequence[ModelFolder], config: ModelConfig) -> dict[str, NDArray[Any]]:
    """A request of one image or video that a model takes; its other inputs are zeros.

    A decoder among the folders, of all models written together, says how long a video has to be.
    """
    from tritonclient.grpc.model_config_pb2 import DataType
    from tritonclient.utils import triton_to_np_dtype

    request = {}
    for tensor in config.input:
        shape = [1] if config.max_batch_size else []
        shape += [max(size, 1) for size in tensor.dims]  # -1 is any size
        kind = DataType.Name(tensor.data_type).removeprefix("TYPE_")
        if tensor.name == IMAGE and kind == "UINT8":
            request[tensor.name] = encoded_file(sample_image(), kind, len(shape))
            continue
        if kind != "STRING":
            request[tensor.name] = np.zeros(shape, triton_to_np_dtype(kind))
            continue
        request[tensor.name] = np.full(shape, b"", np.object_)
        if tensor.name in (IMAGE, VIDEO):
            video = tensor.name == VIDEO
            request[tensor.name][...] = sample_video(_frames(folders)) if video else sample_image()
    return request


def _frames(folders: Sequence[ModelFolder]) -> int:
    """Frames of the longest video that a decoder among these takes."""
    shapes = [
        tensor.dims
        for folder in folders
        if VIDEO in [tensor.name for tensor in folder.config.input]
        for tensor in folder.config.output
        if tensor.name == INPUT_NAME
    ]
    return max((int(shape[0]) for shape in shapes), default=1)


def run_self_test(
    view: Path, repository: Path, folders: Sequence[ModelFolder], *, gpu: bool
) -> str:
    """Run a server on models and ask each about one image."""
    again = ""
    try:
        try:
            _ask_all(view, folders, gpu=gpu)
        except ExportError as error:  # a busy server may crash while it loads, and not do so again
            again = f", at the second try; at the first: {error}"
            _ask_all(view, folders, gpu=gpu)
    except (InputError, ExportError, MissingComponentError) as error:
        reason = str(error).replace(str(view), str(repository))
        raise type(error)(
            f"the self-test failed and nothing was written: {reason}; --no-self-test writes it "
            "all the same"
        ) from error
    where = "on a GPU" if gpu else "on the CPU"
    return f"Self-test: {len(folders)} model{'s' * (len(folders) > 1)} answered {where}{again}"


def _ask_all(view: Path, folders: Sequence[ModelFolder], *, gpu: bool) -> None:
    request = RunRequest(view, gpu=gpu, ready_seconds=READY_SECONDS)
    with running(request) as server, connect(server.grpc, "grpc", READY_SECONDS) as client:
        for folder in folders:
            _ask(client, folders, folder)
        server.stop(0)


def _ask(client: Client, folders: Sequence[ModelFolder], folder: ModelFolder) -> None:
    name = folder.name
    for config, parameters in _requests(folders, folder):
        try:
            request = sample_request(folders, config)
        except ImportError as error:
            raise MissingComponentError(
                f"{error.name} is not installed, which writes the video to ask {name} about; "
                "pip install 'tome-export[video]'"
            ) from error
        try:
            answer = client.infer(name, request, parameters=parameters)
        except (InputError, MissingComponentError) as error:
            reason = str(error).removeprefix(f"{client.address} refused: ")
            raise InputError(f"model {name} does not answer: {reason}") from error
        for tensor in (output.name for output in folder.config.output):
            if tensor not in answer:
                raise InputError(f"model {name} gives no {tensor}")
            # Zeros are no image: a mask of zeros, for one, leaves nothing to take a mean of.
            numbers = {IMAGE, VIDEO} & request.keys() and answer[tensor].dtype.kind == "f"
            if numbers and not np.isfinite(answer[tensor]).all():
                raise InputError(f"model {name} gives a {tensor} that is not finite")


def _requests(
    folders: Sequence[ModelFolder], folder: ModelFolder
) -> Iterator[tuple[ModelConfig, Mapping[str, str]]]:
    """Whose inputs to ask a model about, and parameters; of a router for each model behind it."""
    if ROUTES not in folder.config.parameters:
        yield folder.config, {}
        return
    (listed,) = (
        json.loads(content)["routes"]
        for name, content in folder.files.items()
        if name.endswith(".json") and isinstance(content, bytes)
    )
    configs = {one.name: one.config for one in folders}
    for route in listed:
        # Others are in the repository, and not in the view of it.
        if route["model"] in configs:
            yield configs[route["model"]], {"r": str(route["r"]), "size": route["size"]}
