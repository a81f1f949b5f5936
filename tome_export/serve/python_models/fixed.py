"""Fills requests up to the one batch size that a model takes; runs inside the server.

Inputs and outputs are those of the model, for any number of rows up to its batch. The rows of all
requests that are answered together become one request to the model: the last row is repeated until
the batch is full, and what the model says of the repeated ones is dropped.

``fixed.json`` beside this file names the model. It is asked for the version that this one has. An
error of the model fails all requests of the batch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = "fixed.json"

Array = np.ndarray[Any, Any]


class TritonPythonModel:
    """What the python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the batch, the tensors and the model's name."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self.model = json.loads((folder / SETTINGS).read_text())["model"]
        self.version = int(args["model_version"])
        self.batch = int(config["max_batch_size"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests with one full batch."""
        import triton_python_backend_utils as pb_utils

        given = [
            [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in self.inputs
        ]
        filled = [pad_to_batch(parts, self.batch) for parts in given]
        inner = pb_utils.InferenceRequest(
            model_name=self.model,
            model_version=self.version,
            requested_output_names=self.outputs,
            inputs=[pb_utils.Tensor(n, a) for n, a in zip(self.inputs, filled, strict=True)],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        answer = inner.exec()
        if answer.has_error():
            # One error object in several responses ends the server: each has its own.
            message = answer.error().message()
            errors = [pb_utils.TritonError(message) for _ in requests]
            return [pb_utils.InferenceResponse(error=error) for error in errors]
        found = {
            name: pb_utils.get_output_tensor_by_name(answer, name).as_numpy()
            for name in self.outputs
        }
        responses = []
        ends = np.cumsum([len(part) for part in given[0]])
        for request, part, end in zip(requests, given[0], ends, strict=True):
            asked = set(request.requested_output_names())
            tensors = [
                pb_utils.Tensor(name, array[end - len(part) : end])
                for name, array in found.items()
                if name in asked
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses


def pad_to_batch(parts: list[Array], batch: int) -> Array:
    """Join parts ``[n, ...]``, and repeat the last row until there are ``[batch, ...]``."""
    rows = sum(len(part) for part in parts)
    last = parts[-1][-1:]
    return np.concatenate([*parts, np.repeat(last, batch - rows, axis=0)])
