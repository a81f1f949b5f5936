"""What can run an exported graph: one ``infer`` over named numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tome_export.errors import ExportError, MissingComponentError

if TYPE_CHECKING:
    import onnx

Arrays = Mapping[str, np.ndarray[Any, Any]]


class Runner(Protocol):
    """Runs a model on a batch."""

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for inputs by name, batch first."""


class OrtCpuRunner:
    """ONNX Runtime on the CPU; bfloat16 models run emulated (see ``onnx.emulate``).

    Raises:
        MissingComponentError: if onnxruntime is not installed.
        ExportError: if onnxruntime refuses the model.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingComponentError(
                "onnxruntime is not installed; install tome-export[cpu] or tome-export[gpu]"
            ) from error
        from tome_export.onnx.emulate import emulate_bfloat16, uses_bfloat16
        from tome_export.onnx.files import serialized

        if uses_bfloat16(model):
            model = emulate_bfloat16(model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            with serialized(model) as source:
                self._session = onnxruntime.InferenceSession(
                    source, options, providers=["CPUExecutionProvider"]
                )
        except Exception as error:
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} cannot load the model: {error}"
            ) from error
        self.output_names: list[str] = [value.name for value in self._session.get_outputs()]

    def __enter__(self) -> OrtCpuRunner:
        return self

    def __exit__(self, *_: object) -> None:
        del self._session

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch."""
        results = self._session.run(None, dict(inputs))
        return dict(zip(self.output_names, results, strict=True))


def infer_in_batches(
    runner: Runner, inputs: Arrays, count: int, size: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Run any number of images in batches of exactly ``size``, the last one padded.

    Args:
        runner: What runs.
        inputs: Arrays whose first dimension is ``count``.
        count: Number of images.
        size: Images per batch.
    """
    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    for start in range(0, count, size):
        index = np.minimum(np.arange(start, start + size), count - 1)
        part = runner.infer({k: v[index] for k, v in inputs.items()})
        parts.append({k: v[: min(size, count - start)] for k, v in part.items()})
    names: Sequence[str] = list(parts[0])
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
