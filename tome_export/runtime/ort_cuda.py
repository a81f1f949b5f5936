"""ONNX Runtime on an NVIDIA GPU, by the CUDA provider that comes with onnxruntime-gpu."""

from __future__ import annotations

from tome_export.runtime import ort
from tome_export.runtime.runner import Backend, Runnable


class OrtCuda(Backend):
    """Computes fp32 in fp32: TF32 is switched off."""

    name = "ort-cuda"
    title = "ONNX Runtime CUDA"

    def missing(self) -> str | None:
        """See ``Backend.missing``."""
        return ort.missing("cuda")

    def open(self, runnable: Runnable) -> ort.OrtRunner:
        """See ``Backend.open``."""
        return ort.OrtRunner(ort.graph_of(runnable), "cuda")
