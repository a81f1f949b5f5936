"""``logits`` to the k best labels with their scores; runs inside the server.

Input ``logits`` FP32 ``[B, K]``. Outputs, best first: ``label`` BYTES ``[B, k]``, ``score`` FP32
``[B, k]`` (softmax over all K classes), ``index`` INT32 ``[B, k]``. Of equal logits the lower index
comes first. ``postprocessing.json`` beside this file holds k and the labels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = "postprocessing.json"


class TritonPythonModel:
    """What the python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read k and the labels."""
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / SETTINGS).read_text())
        self.k: int = settings["k"]
        # BYTES tensors are arrays of bytes objects.
        self.labels = np.array([label.encode() for label in settings["labels"]], dtype=object)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; one whose logits are not finite gets an error of its own."""
        import triton_python_backend_utils as pb_utils

        responses = []
        for request in requests:
            logits = pb_utils.get_input_tensor_by_name(request, "logits").as_numpy()
            if not np.isfinite(logits).all():
                error = pb_utils.TritonError("the model's logits are not finite for this input")
                responses.append(pb_utils.InferenceResponse(error=error))
                continue
            index, score = top_k(logits, self.k)
            outputs = {"label": self.labels[index], "score": score, "index": index}
            tensors = [pb_utils.Tensor(name, value) for name, value in outputs.items()]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses


def top_k(
    logits: np.ndarray[Any, Any], k: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The k best classes of finite ``logits [B, K]``: index int32 and softmax score float32."""
    index = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    scores = powers / powers.sum(axis=1, keepdims=True)
    best = np.take_along_axis(scores, index, axis=1)
    return index.astype(np.int32), best.astype(np.float32)
