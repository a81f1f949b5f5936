"""TensorRT-RTX's engines."""

from __future__ import annotations

from tome_export.engine.tensorrt_rtx import TensorRTRTX as Builder
from tome_export.runtime.polygraphy import EngineBackend


class TensorRTRTX(EngineBackend):
    """Runs what was built anywhere; kernels are finished on the GPU at the first run."""

    name = "tensorrt-rtx"
    title = "TensorRT-RTX"
    builder = Builder()
