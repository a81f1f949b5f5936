"""The stages put together: build an artifact, add an engine to one, check one."""

from tome_export.pipeline.build import BuildRequest, build
from tome_export.pipeline.check import CheckRequest, CheckResult, check
from tome_export.pipeline.engine import EngineRequest, add_engine

__all__ = [
    "BuildRequest",
    "CheckRequest",
    "CheckResult",
    "EngineRequest",
    "add_engine",
    "build",
    "check",
]
