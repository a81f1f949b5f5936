"""What builders of engines take and say. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from tome_export.errors import UsageError
from tome_export.spec import BatchRange


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        batch: Batch sizes of the one optimisation profile: least, tuned for, most.
        workspace_bytes: Most scratch memory a tactic may use; None leaves the builder's default.
        optimization_level: 0 (fast build) to 5 (longest search); None leaves the default (3).
        timing_cache: File of tactic timings, read when it exists and written after the build.
        version_compatible: The engine also runs on later TensorRT versions of the same major.
        hardware_compatible: The engine runs on every GPU of the Ampere generation and later.
        compute_capabilities: GPUs a TensorRT-RTX engine is built for, such as ``("8.9", "12.0")``,
            or ``("current",)``; empty for its portable default (Ampere and later). At a build with
            ``--merge-op plugin`` also the GPUs its kernels are compiled for.

    Raises:
        UsageError: if a value is out of its range.
    """

    batch: BatchRange = field(default_factory=BatchRange)
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise UsageError(f"workspace is {self.workspace_bytes} bytes; expected more than 0")
        level = self.optimization_level
        if level is not None and not 0 <= level <= 5:
            raise UsageError(f"optimisation level is {level}; expected 0 to 5")
        for capability in self.compute_capabilities:
            if capability != "current" and not re.fullmatch(r"[0-9]+\.[0-9]", capability):
                raise UsageError(
                    f"compute capability is {capability!r}; expected one such as 8.9, or current"
                )


@dataclass(frozen=True)
class Availability:
    """Whether a component can be used here.

    Attributes:
        available: Whether it can.
        version: Its version, where it is installed.
        reason: One line: what was found, or what is missing and how to get it.
    """

    available: bool
    version: str | None
    reason: str
