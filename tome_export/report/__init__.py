"""All that was found out about an artifact, on one page."""

from tome_export.report.main import ReportRequest, ReportResult, report

__all__ = ["ReportRequest", "ReportResult", "report"]
