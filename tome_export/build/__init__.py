"""Build an artifact: patch, export, prove parity, build an engine, write the directory."""

from tome_export.build.main import build, build_sizes
from tome_export.build.request import BuildRequest

__all__ = ["BuildRequest", "build", "build_sizes"]
