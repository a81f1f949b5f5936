"""Engines: TensorRT and TensorRT-RTX behind one small interface.

Adding a backend is one module that subclasses ``builder.PythonApiBackend`` (or implements
``base.Backend``) and one line in ``select.BACKENDS``.
"""

from tome_export.engine.base import (
    Availability,
    Backend,
    EngineInfo,
    EngineOptions,
    Runner,
    TensorInfo,
)
from tome_export.engine.select import Choice, Selection, backend_for_file, select

__all__ = [
    "Availability",
    "Backend",
    "Choice",
    "EngineInfo",
    "EngineOptions",
    "Runner",
    "Selection",
    "TensorInfo",
    "backend_for_file",
    "select",
]
