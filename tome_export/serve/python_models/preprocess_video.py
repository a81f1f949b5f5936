"""Video files to ``pixel_values`` and ``video_mask``; runs inside the server.

Input ``video`` BYTES ``[B, 1]``: one whole video file each. Outputs ``pixel_values`` FP32
``[B, F, C, H, W]``, every frame preprocessed as an image, and ``video_mask`` FP32 ``[B, F]``, all
ones, where the model takes one. ``preprocessing.json`` beside this file says how. A video that
cannot be used fails the request it came with, and no other.
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
    """The module of a file that lies beside the model's own."""
    spec = importlib.util.spec_from_file_location(f"tome_export_{name}", folder / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}.py is not beside the model; write the repository again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TritonPythonModel:
    """What the python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings, and start the threads that decode (PyAV releases the GIL)."""
        if importlib.util.find_spec("av") is None:
            raise ImportError(
                "the server's Python has no PyAV, which decodes videos; pip install av there"
            )
        folder = Path(args["model_repository"]) / args["model_version"]
        self.settings = json.loads((folder / SETTINGS).read_text())
        self.images, self.frames = beside("preprocess", folder), beside("frames", folder)
        self.threads = ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, with pixels or an error of its own."""
        import triton_python_backend_utils as pb_utils

        waiting = [
            [self.threads.submit(self.pixels, data) for data in _videos(request, pb_utils)]
            for request in requests
        ]
        return [self._answer(futures, pb_utils) for futures in waiting]

    def pixels(self, data: bytes) -> np.ndarray[Any, Any]:
        """One video file to ``[F, C, H, W]`` float32.

        Raises:
            BadVideoError: if it is no video, damaged, too short or too large; of ``frames``.
        """
        count, most = self.settings["frames"], self.settings["max_pixels"]

        def prepare(frame: Any) -> Any:
            return self.images.pixels_from_image(frame, self.settings)

        return np.stack(self.frames.prepared_frames(bytes(data), count, prepare, most))

    def finalize(self) -> None:
        """Let the threads end with the model."""
        self.threads.shutdown(cancel_futures=True)

    def _answer(self, futures: list[Future[Any]], pb_utils: Any) -> Any:
        problem = _problem([future.exception() for future in futures])
        if problem:
            error = pb_utils.TritonError(problem, pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        pixels = np.stack([future.result() for future in futures])
        outputs = [pb_utils.Tensor("pixel_values", pixels)]
        if self.settings["mask"]:
            mask = np.ones(pixels.shape[:2], np.float32)
            outputs.append(pb_utils.Tensor("video_mask", mask))
        return pb_utils.InferenceResponse(outputs)


def _videos(request: Any, pb_utils: Any) -> list[bytes]:
    given = pb_utils.get_input_tensor_by_name(request, "video").as_numpy()
    return [bytes(data) for data in given.reshape(-1)]


def _problem(errors: list[BaseException | None]) -> str:
    """What is wrong with a request, from the outcome of each of its videos; empty if nothing."""
    if not errors:
        return "the request holds no video; expected 1 or more"
    found = next((pair for pair in enumerate(errors, 1) if pair[1] is not None), None)
    if found is None:
        return ""
    where = f" {found[0]} of {len(errors)}" if len(errors) > 1 else ""
    return f"video{where} {found[1]}"
