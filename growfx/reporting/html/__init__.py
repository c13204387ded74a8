"""One self-contained HTML file about one or several runs."""

from growfx.reporting.html.write import ReportFile, report

__all__ = ["ReportFile", "report"]
