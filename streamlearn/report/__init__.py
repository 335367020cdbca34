"""The report page."""

from streamlearn.report.page import build_report

__all__ = ["build_report"]
