"""Compare decisions and numbers with PyTorch."""

from tome_export.parity.main import CheckRequest, CheckResult, check

__all__ = ["CheckRequest", "CheckResult", "check"]
