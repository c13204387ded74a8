"""`growfx compare`: methods side by side."""

from growfx.commands.compare.comparison import compare

__all__ = ["compare"]
