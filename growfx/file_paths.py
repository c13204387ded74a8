"""Check the path arguments of public functions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from growfx.errors import GrowfxError

__all__ = ["as_path"]


def as_path(path: Any, door: str, kind: type[GrowfxError]) -> Path:
    """Return `path` as a `Path`, or raise `kind`; `door` names the public function, as in "growfx.save"."""
    if isinstance(path, (str, os.PathLike)):
        found = os.fspath(path)
        if isinstance(found, str) and found and "\0" not in found:
            return Path(found)
    raise kind(f"{door} expects a path, got {path!r}"[:200])
