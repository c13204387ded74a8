"""A run on disk: its folder, lock, checkpoints and result."""

from growfx.runs.checkpoint import Checkpoints
from growfx.runs.folder import RunFolder
from growfx.runs.result import Result

__all__ = ["Checkpoints", "Result", "RunFolder"]
