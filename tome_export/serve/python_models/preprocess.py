"""Encoded images or videos to ``pixel_values``, as the artifact's recipe does it; in the server.

Input ``image`` BYTES ``[B, 1]``: one whole JPEG or PNG file each; output ``pixel_values`` FP32
``[B, C, H, W]``. Of a model of videos: input ``video``, one whole video file each; outputs
``pixel_values`` FP32 ``[B, F, C, H, W]``, every frame preprocessed as an image, and ``video_mask``
FP32 ``[B, F]``, all ones, where the model takes one.

``preprocessing.json`` beside this file says how, ``pixels.py`` and ``frames.py`` do it. What cannot
be used fails the request it came with, and no other.
"""

from __future__ import annotations

import importlib.util
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

SETTINGS = "preprocessing.json"


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


class TritonPythonModel:
    """What the python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings, and start the threads that decode (decoders release the GIL)."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.settings = json.loads((folder / SETTINGS).read_text())
        self.kind = "video" if "frames" in self.settings else "image"
        check_decoder("PIL", "pillow", "Pillow, which decodes images")
        self.images = beside("pixels", folder)
        if self.kind == "video":
            check_decoder("av", "av", "PyAV, which decodes videos")
            self.frames = beside("frames", folder)
        # The process is ours alone. Our limit is checked from the header, before any decoding.
        self.images.Image.MAX_IMAGE_PIXELS = None
        self.images.Image.preinit()
        self.threads = ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, with pixels or an error of its own."""
        import triton_python_backend_utils as pb_utils

        batches = [
            pb_utils.get_input_tensor_by_name(request, self.kind).as_numpy().reshape(-1)
            for request in requests
        ]
        # All of all requests are on their way before the first one is waited for.
        waiting = [[self.threads.submit(self.pixels, data) for data in batch] for batch in batches]
        return [self._answer(futures, pb_utils) for futures in waiting]

    def pixels(self, data: bytes) -> np.ndarray[Any, Any]:
        """One file to ``[C, H, W]`` or ``[F, C, H, W]`` float32.

        Raises:
            ValueError: if it is no image or video, damaged, too short or too large.
        """
        settings = self.settings
        if self.kind == "image":
            found: np.ndarray[Any, Any] = self.images.pixels_from_bytes(data, settings)
            return found

        def prepare(frame: Any) -> Any:
            return self.images.pixels_from_image(frame, settings)

        count, most = settings["frames"], settings["max_pixels"]
        return np.stack(self.frames.prepared_frames(bytes(data), count, prepare, most))

    def finalize(self) -> None:
        """Let the threads end with the model."""
        self.threads.shutdown(cancel_futures=True)

    def _answer(self, futures: list[Future[Any]], pb_utils: Any) -> Any:
        problem = problem_of(self.kind, [future.exception() for future in futures])
        if problem:
            error = pb_utils.TritonError(problem, pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        pixels = np.stack([future.result() for future in futures])
        outputs = [pb_utils.Tensor("pixel_values", pixels)]
        if self.settings.get("mask"):
            mask = np.ones(pixels.shape[:2], np.float32)
            outputs.append(pb_utils.Tensor("video_mask", mask))
        return pb_utils.InferenceResponse(outputs)


def problem_of(kind: str, errors: list[BaseException | None]) -> str:
    """What is wrong with a request, from the outcome of each of its files; empty if nothing."""
    if not errors:
        return f"the request holds no {kind}; expected 1 or more"
    found = next((pair for pair in enumerate(errors, 1) if pair[1] is not None), None)
    if found is None:
        return ""
    where = f" {found[0]} of {len(errors)}" if len(errors) > 1 else ""
    return f"{kind}{where} {found[1]}"
