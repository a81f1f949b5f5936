"""``logits`` to the k best labels with their scores; runs inside the server.

Input ``logits`` FP32 ``[B, K]``. Outputs, best first: ``label`` BYTES ``[B, k]``, ``score`` FP32
``[B, k]``, ``index`` INT32 ``[B, k]``. Of equal logits the lower index comes first. The score is
the softmax over all K classes; the sigmoid of each logit where classes do not exclude each other,
or there is one; or the number itself of a regression, whose outputs keep their order.
``postprocessing.json`` beside this file holds k, the labels and the activation.
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
        """Read k, the labels and the activation."""
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / SETTINGS).read_text())
        self.k: int = settings["k"]
        self.activation: str = settings["activation"]
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
            index, score = top_k(logits, self.k, self.activation)
            outputs = {"label": self.labels[index], "score": score, "index": index}
            tensors = [pb_utils.Tensor(name, value) for name, value in outputs.items()]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses


def top_k(
    logits: np.ndarray[Any, Any], k: int, activation: str = "softmax"
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The k best classes of finite ``logits [B, K]``: index int32 and score float32 ``[B, k]``."""
    wide = logits.astype(np.float64)
    if activation == "none":
        index = np.broadcast_to(np.arange(k), (len(logits), k))
    else:
        index = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    if activation == "softmax":
        powers = np.exp(wide - wide.max(axis=1, keepdims=True))
        wide = powers / powers.sum(axis=1, keepdims=True)
    elif activation == "sigmoid":
        wide = (1 + np.tanh(wide / 2)) / 2  # which overflows for no logit
    best = np.take_along_axis(wide, index, axis=1)
    return index.astype(np.int32), best.astype(np.float32)
