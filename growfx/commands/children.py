"""Child processes that begin quickly and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from typing import Any

__all__ = ["end_with_parent", "fork_context"]


def fork_context(preload: Sequence[str]) -> BaseContext:
    """Processes forked from one that has imported `preload`, so that a fresh one takes a moment.

    Where processes are not forked, each imports what it needs.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        return context
    return multiprocessing.get_context("spawn")


def end_with_parent(lifeline: Any) -> None:
    """End this process when the other end of the pipe `lifeline` is closed, which happens however the parent ends."""
    threading.Thread(target=_wait_for_end, args=(lifeline,), daemon=True).start()


def _wait_for_end(lifeline: Any) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
