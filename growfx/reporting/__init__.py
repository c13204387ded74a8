"""Tables and pictures of runs."""

from growfx.reporting.run import percent, table, write_report

__all__ = ["percent", "table", "write_report"]
