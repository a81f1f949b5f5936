"""A stand-in for the server's ONNX Runtime backend, on the CPU.

A server that comes without that backend loads this file as ``onnxruntime/model.py`` of its
backend directory, runs it in its python backend, and so takes configs written for the real one
as they are. Accelerators that a config names are for the real backend and are left out here.
Results served through it are to be labelled so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of an ONNX model; the server makes one process for each."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model."""
        import onnxruntime

        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        threads = config.get("parameters", {}).get("intra_op_thread_count")
        if threads is not None:
            options.intra_op_num_threads = int(threads["string_value"])
        file = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / file
        if not path.is_file():
            raise pb_utils.TritonModelException(f"{file} is not in version {args['model_version']}")
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._batches = config["max_batch_size"] > 0
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a batch of requests with one run, or one for each shape among them."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[object, list[int]] = {}
        feeds = []
        for position, request in enumerate(requests):
            tensors = [pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs]
            feeds.append([tensor.as_numpy() for tensor in tensors])
            shapes = tuple(array.shape[1:] for array in feeds[-1])
            groups.setdefault(shapes if self._batches else position, []).append(position)
        for members in groups.values():
            try:
                answers = self._run([feeds[position] for position in members])
            except Exception as error:  # ONNX Runtime's own classes share no narrower base
                failure = pb_utils.TritonError(" ".join(str(error).split()))
                for position in members:
                    responses[position] = pb_utils.InferenceResponse(error=failure)
                continue
            for position, arrays in zip(members, answers, strict=True):
                responses[position] = self._response(requests[position], arrays)
        return responses

    def _run(self, feeds: list[list[Any]]) -> list[list[Any]]:
        """Outputs of each request, in the order of the config."""
        joined = [np.concatenate(parts) for parts in zip(*feeds, strict=True)]
        outputs = self._session.run(self._outputs, dict(zip(self._inputs, joined, strict=True)))
        ends = np.cumsum([len(feed[0]) for feed in feeds])[:-1]
        return [list(parts) for parts in zip(*(np.split(o, ends) for o in outputs), strict=True)]

    def _response(self, request: Any, arrays: list[Any]) -> Any:
        asked = set(request.requested_output_names())
        named = zip(self._outputs, arrays, strict=True)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in named if name in asked]
        )
