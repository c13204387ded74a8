"""Ignore warnings of other libraries within a block; safe under threads."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["ignored_warnings"]

_GUARD = threading.Lock()
_inside = 0
_saved = warnings.catch_warnings()


@contextmanager
def ignored_warnings(category: type[Warning] = Warning, message: str = "") -> Generator[None]:
    """Within the block, warnings of `category` whose text begins with `message` (a regular expression) are ignored.

    `warnings.catch_warnings` saves the filters of the whole process and puts them back. Where two threads overlap, the
    one that leaves last puts back what the other had set, for good. Here the first to enter saves them and the last to
    leave puts them back; until then warnings of other threads are ignored, too.
    """
    global _inside, _saved
    if getattr(sys.flags, "context_aware_warnings", False):  # Python 3.14 can keep filters for each thread
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message, category)
            yield
        return
    with _GUARD:
        if _inside == 0:
            _saved = warnings.catch_warnings()
            _saved.__enter__()
        _inside += 1
        warnings.filterwarnings("ignore", message, category)
    try:
        yield
    finally:
        with _GUARD:
            _inside -= 1
            if _inside == 0:
                _saved.__exit__(None, None, None)
