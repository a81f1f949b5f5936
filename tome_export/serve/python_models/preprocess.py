"""Encoded images or videos to ``pixel_values``, as the artifact's recipe does it; in the server.

Input ``image`` BYTES ``[B, 1]``: one whole JPEG or PNG file each; output ``pixel_values`` FP32
``[B, C, H, W]``. Of a model of videos: input ``video``, one whole video file each; outputs
``pixel_values`` FP32 ``[B, F, C, H, W]``, every frame preprocessed as an image, and ``video_mask``
FP32 ``[B, F]``, all ones, where the model takes one.

``preprocessing.json`` beside this file says how, ``pixels.py`` and ``frames.py`` do it: in the
processes of ``decoder.py`` as far as bytes of pixels, and here the rest, which makes four times as
many of them. What cannot be used fails the request it came with, and no other; what takes long has
processes of its own, so that nothing else waits for it. Answers are sent as soon as they are there,
which the server allows since release 24.06.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

SETTINGS = "preprocessing.json"

SMALL_BYTES = 1 << 22
SMALL_PIXELS = 1 << 22
"""Images up to both sizes are decoded in tens of milliseconds, and wait for no larger one."""

SCALED_PIXELS, SCALED_SCANS = 1 << 24, 4
"""The same of a JPEG file of few scans that is decoded at a part of its size, in that time too."""

SMALL_SECONDS = 2
"""Most time of a processor that one of them takes."""

LEAST_DECODERS, MOST_DECODERS = 2, 16
"""Processes that decode smaller images, unless the settings say how many; there is one for each
core, and half as many more, at least two, for larger images and videos."""

NICENESS = 10
"""How far their processes stand back behind all others."""


def beside(name: str, folder: Path) -> ModuleType:
    """The module of a file that lies beside the model's own, whatever else has that name."""
    spec = importlib.util.spec_from_file_location(f"tome_export_{name}", folder / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}.py is not beside the model; write the repository again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_decoder(module: str, install: str, what: str) -> None:
    """Whether a decoder is installed; NVIDIA's container of the server comes without any."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"the server's Python has no {what}; pip install {install} there")


class DecoderPool:
    """Threads with a decoding process for each (a ``decoder.Decoder``), ready from the start."""

    def __init__(self, count: int, make: Callable[[], Any]) -> None:
        self._threads = ThreadPoolExecutor(count)
        self._made = [make() for _ in range(count)]
        list(self._threads.map(lambda decoder: decoder.start(), self._made))
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for decoder in self._made:
            self._idle.put(decoder)

    def submit(self, *asked: Any) -> Future[Any]:
        """Decode, as soon as a process has nothing else to do."""
        return self._threads.submit(self._decode, *asked)

    def _decode(self, *asked: Any) -> Any:
        decoder = self._idle.get()
        try:
            return decoder(*asked)
        finally:
            self._idle.put(decoder)

    def close(self) -> None:
        """Decode what was submitted, and end the processes."""
        self._threads.shutdown()
        for decoder in self._made:
            decoder.close()


class TritonPythonModel:
    """What the python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings, and make sure of what decodes."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.settings = json.loads((folder / SETTINGS).read_text())
        self.kind = "video" if "frames" in self.settings else "image"
        check_decoder("PIL", "pillow", "Pillow, which decodes images")
        frames = None
        if self.kind == "video":
            check_decoder("av", "av", "PyAV, which decodes videos")
            frames = folder / "frames.py"
        decoder, self.pixels = beside("decoder", folder), beside("pixels", folder)
        self.headers = beside("headers", folder)
        form = self.settings.get("form", "float32")
        # What a process hands over; the model that takes numbers is given them here.
        self.asked = {**self.settings, "form": "uint8" if form == "float32" else form}
        self.normalises = form == "float32"

        def small() -> Any:
            return decoder.Decoder(folder / "pixels.py", seconds={"pixels": SMALL_SECONDS})

        def large() -> Any:
            return decoder.Decoder(folder / "pixels.py", frames, NICENESS)

        count = self.settings["decoders"] or min(MOST_DECODERS, len(os.sched_getaffinity(0)))
        groups = json.loads(args["model_config"])["instance_group"]
        instances = sum(group["count"] for group in groups)  # which share them
        count = max(LEAST_DECODERS, -(-count // instances))
        self.large = self.small = DecoderPool(max(LEAST_DECODERS, count // 2), large)
        if self.kind == "image":
            self.small = DecoderPool(count, small)

    def execute(self, requests: list[Any]) -> None:
        """Take requests; each is answered, with pixels or an error of its own, when it is done."""
        import triton_python_backend_utils as pb_utils

        for request in requests:
            sender = request.get_response_sender()
            batch = pb_utils.get_input_tensor_by_name(request, self.kind).as_numpy().reshape(-1)
            PendingResponse(self, sender, pb_utils, [self.submit(data) for data in batch])

    def submit(self, data: bytes) -> Future[Any]:
        """The pixels of one file, ``[H, W, C]`` or ``[F, H, W, C]``, or the error that it makes."""
        pool = self.large
        if self.kind == "image":
            header = self.headers.read_header(data) if len(data) <= SMALL_BYTES else None
            soon = is_small(data, header, scaled=self.settings["scaled_decoding"])
            pool = self.small if soon else self.large
        return pool.submit("video" if self.kind == "video" else "pixels", data, self.asked)

    def finalize(self) -> None:
        """Let the processes end with the model."""
        self.small.close()
        self.large.close()

    def response(self, futures: list[Future[Any]], pb_utils: Any) -> Any:
        """The answer to a request of files that are all done."""
        problem = error_message(self.kind, [future.exception() for future in futures])
        if problem:
            error = pb_utils.TritonError(problem, pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        pixels = np.stack([future.result() for future in futures])
        if self.normalises:
            pixels = self.pixels.normalised(pixels, self.asked)
        outputs = [pb_utils.Tensor("pixel_values", pixels)]
        if self.settings.get("mask"):
            mask = np.ones(pixels.shape[:2], np.float32)
            outputs.append(pb_utils.Tensor("video_mask", mask))
        return pb_utils.InferenceResponse(outputs)


class PendingResponse:
    """Sends the answer to a request when the last of its files is done."""

    def __init__(
        self, model: TritonPythonModel, sender: Any, pb_utils: Any, futures: list[Future[Any]]
    ) -> None:
        self._model, self._sender, self._pb_utils = model, sender, pb_utils
        self._futures = futures
        self._lock = threading.Lock()
        self._missing = max(1, len(futures))
        if not futures:
            self._done(None)
        for future in futures:
            future.add_done_callback(self._done)

    def _done(self, _: Future[Any] | None) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing:
                return
        utils = self._pb_utils
        try:
            response = self._model.response(self._futures, utils)
        except Exception as error:  # a request without an answer would never end
            failure = utils.TritonError(f"{self._model.kind} {type(error).__name__}: {error}")
            response = utils.InferenceResponse(error=failure)
        self._sender.send(response, flags=utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def is_small(data: bytes, header: Any, *, scaled: bool = False) -> bool:
    """Whether a JPEG or PNG file is soon decoded, from its header; also what is neither."""
    if len(data) > SMALL_BYTES:
        return False
    if header is None:
        return not data.startswith((b"\x89PNG", b"\xff\xd8"))
    # Of a progressive file all coefficients are decoded, at whatever size. A preview in the
    # metadata has a scan as well.
    few = header.baseline and data.count(b"\xff\xda") <= SCALED_SCANS
    most = SCALED_PIXELS if scaled and few else SMALL_PIXELS
    return bool(header.width * header.height <= most)


def error_message(kind: str, errors: list[BaseException | None]) -> str:
    """What is wrong with a request, from the outcome of each of its files; empty if nothing."""
    if not errors:
        return f"the request holds no {kind}; expected 1 or more"
    found = next((pair for pair in enumerate(errors, 1) if pair[1] is not None), None)
    if found is None:
        return ""
    where = f" {found[0]} of {len(errors)}" if len(errors) > 1 else ""
    return f"{kind}{where} {found[1]}"
