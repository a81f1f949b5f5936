"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

from tome_export.runtime import ort
from tome_export.runtime.runner import Backend, Runnable
from tome_export.spec import Precision


class OrtCpu(Backend):
    """Its kernels take no bfloat16, which is computed in float32 and rounded."""

    name = "ort-cpu"
    title = "ONNX Runtime CPU"

    def missing(self) -> str | None:
        """See ``Backend.missing``."""
        return ort.missing("cpu")

    def open(self, runnable: Runnable) -> ort.OrtRunner:
        """See ``Backend.open``."""
        graph = ort.graph_of(runnable)
        if runnable.precision == "bf16" and isinstance(graph, Path):
            from tome_export.onnx.files import load

            graph = load(graph)
        return ort.OrtRunner(graph)

    def computes(self, precision: Precision) -> Precision:
        """See ``Backend.computes``."""
        return "fp32" if precision == "bf16" else precision

    def on_gpu(self) -> bool:
        """See ``Backend.on_gpu``."""
        return False
