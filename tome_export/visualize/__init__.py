"""Which patches became one token, and pictures of it."""

from tome_export.visualize.main import InspectRequest, InspectResult, inspect

__all__ = ["InspectRequest", "InspectResult", "inspect"]
