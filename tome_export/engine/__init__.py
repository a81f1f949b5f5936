"""Engines: TensorRT and TensorRT-RTX behind one small interface.

Adding one is one module that subclasses ``builder.EngineBuilder``, one line in
``select.BUILDERS``, and a backend in ``runtime`` that runs its engines.
"""

from tome_export.engine.builder import Availability, EngineBuilder, EngineOptions
from tome_export.engine.select import Choice, Selection, select

__all__ = [
    "Availability",
    "Choice",
    "EngineBuilder",
    "EngineOptions",
    "Selection",
    "select",
]
