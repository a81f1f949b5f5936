"""Search the tokens to merge in each layer for a target."""

from tome_export.tune.main import TuneRequest, tune

__all__ = ["TuneRequest", "tune"]
