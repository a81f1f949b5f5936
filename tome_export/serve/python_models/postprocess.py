"""``logits`` to the k best labels with their scores; runs inside the server.

Input ``logits`` FP32 ``[B, K]``. Outputs, best first: ``label`` BYTES ``[B, k]``, ``score`` FP32
``[B, k]``, ``index`` INT32 ``[B, k]``. ``postprocessing.json`` beside this file holds k, the labels
and the activation; ``scores.py`` beside it makes scores of logits.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

SETTINGS = "postprocessing.json"


class TritonPythonModel:
    """What the python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read k, the labels and the activation."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.top_k = beside(folder).top_k
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
            index, score = self.top_k(logits, self.k, self.activation)
            outputs = {"label": self.labels[index], "score": score, "index": index}
            tensors = [pb_utils.Tensor(name, value) for name, value in outputs.items()]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses


def beside(folder: Path) -> ModuleType:
    """The module of ``scores.py`` beside this file, whatever else has that name."""
    spec = importlib.util.spec_from_file_location("tome_export_scores", folder / "scores.py")
    if spec is None or spec.loader is None:
        raise ImportError("scores.py is not beside the model; write the repository again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
