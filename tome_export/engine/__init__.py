"""Engines: TensorRT and TensorRT-RTX behind one small interface.

Adding a backend is one module that subclasses ``builder.PythonApiBackend`` (or implements
``base.Backend``) and one line in ``select.BACKENDS``.
"""

from tome_export.artifact.manifest import EngineInfo
from tome_export.engine.base import Availability, Backend, EngineOptions
from tome_export.engine.select import Choice, Selection, backend_for_file, select
from tome_export.spec import TensorInfo

__all__ = [
    "Availability",
    "Backend",
    "Choice",
    "EngineInfo",
    "EngineOptions",
    "Selection",
    "TensorInfo",
    "backend_for_file",
    "select",
]
