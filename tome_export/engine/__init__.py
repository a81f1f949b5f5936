"""Engines: TensorRT and TensorRT-RTX behind one small interface.

Adding one is one module that subclasses ``builder.EngineBuilder``, one line in ``BUILDERS``, and a
backend in ``runtime`` that runs its engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tome_export.engine.builder import Availability, EngineBuilder, EngineOptions
from tome_export.engine.tensorrt import TensorRT
from tome_export.engine.tensorrt_rtx import TensorRTRTX
from tome_export.errors import MissingComponentError, UsageError

__all__ = ["Availability", "EngineBuilder", "EngineOptions"]

Choice = Literal["auto", "tensorrt", "tensorrt-rtx", "none"]
CHOICES: tuple[Choice, ...] = get_args(Choice)

# In the order in which ``auto`` prefers them.
BUILDERS: tuple[EngineBuilder, ...] = (TensorRT(), TensorRTRTX())


@dataclass(frozen=True)
class Selection:
    """The builder to build with, or None, and one line that says why."""

    builder: EngineBuilder | None
    line: str


def select(choice: str = "auto") -> Selection:
    """Choose a builder.

    ``auto`` takes TensorRT where it and a GPU are, else TensorRT-RTX, else none.
    """
    if choice not in CHOICES:
        raise UsageError(f"engine is {choice!r}; expected one of {', '.join(CHOICES)}")
    if choice == "none":
        return Selection(None, "no engine, as asked")
    refused: list[str] = []
    for builder in BUILDERS:
        if choice not in ("auto", builder.name):
            continue
        ready = builder.can_build()
        if ready.available:
            return Selection(builder, "; ".join([f"{ready.reason} builds the engine", *refused]))
        refused.append(ready.reason)
    if choice == "auto":
        return Selection(None, "no engine is built: " + "; ".join(refused))
    raise MissingComponentError(refused[0])
