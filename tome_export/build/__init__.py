"""Build an artifact: patch, export, prove parity, build an engine, write the directory."""

from tome_export.build.main import BuildRequest, build

__all__ = ["BuildRequest", "build"]
