"""TensorRT's engines."""

from __future__ import annotations

from tome_export.engine.tensorrt import TensorRT as Builder
from tome_export.runtime.polygraphy import EngineBackend


class TensorRT(EngineBackend):
    """Runs what it built on this kind of GPU."""

    name = "tensorrt"
    title = "TensorRT"
    builder = Builder()
