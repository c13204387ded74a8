"""Warn about conditions that are not errors but affect the result, once for each cause."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from growfx.errors import GrowfxWarning

__all__ = ["LOGGER", "OWN_FOLDERS", "hearing", "warn_once"]

# The one logger of the package: a recording fell back, a kernel was not built, a round was refused.
LOGGER = logging.getLogger("growfx")
# Where the code of growfx lies: what runs there is not the user's code.
OWN_FOLDERS = (str(Path(__file__).parent), str(Path(__file__).parent.parent / "passes"))
# Who hears what this thread warns of.
_HEARD: ContextVar[tuple[list[str], ...]] = ContextVar("heard", default=())


def warn_once(message: str, notes: list[str]) -> None:
    """Warn with a `GrowfxWarning` that points at the caller of growfx, unless `notes` holds the message already.

    Args:
        message: what happened and what to do.
        notes: the messages of the object that is returned (`net.trace_report.notes`, ...); the message is added.
    """
    if message in notes:
        return
    notes.append(message)
    LOGGER.info(message)
    for heard in _HEARD.get():
        if message not in heard:
            heard.append(message)
    warnings.warn(message, GrowfxWarning, stacklevel=_levels_to_caller())


@contextmanager
def hearing(messages: list[str]) -> Generator[None]:
    """Within the block, add what this thread warns of to `messages`, once each, whatever filters show of it."""
    token = _HEARD.set((*_HEARD.get(), messages))
    try:
        yield
    finally:
        _HEARD.reset(token)


def _levels_to_caller() -> int:
    """Stack levels from `warn_once` up to the first frame that is not growfx's or torch's own."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(OWN_FOLDERS) or frame.f_globals.get("__name__", "").startswith("torch.")
    ):
        level, frame = level + 1, frame.f_back
    return level
