"""Right answers on labelled images, merged against unmerged."""

from tome_export.evaluate.main import EvalRequest, EvalResult, evaluate

__all__ = ["EvalRequest", "EvalResult", "evaluate"]
