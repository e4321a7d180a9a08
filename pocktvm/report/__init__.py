"""One self-contained HTML page about an artifact."""

from pocktvm.report.page import report

__all__ = ["report"]
