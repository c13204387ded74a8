"""What was timed on this machine, kept in the user's cache folder, so that it is timed once.

A cache holds nothing but which of several equal ways is fastest, so the worst a wrong one can do is to cost time. One
file a key, written whole or not at all; what cannot be read, or is not what was asked for, is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "ignored_choices", "read_choices", "write_choices"]

_LARGEST = 1 << 24
_IGNORED: ContextVar[bool] = ContextVar("growfx_ignored_choices", default=False)


@contextmanager
def ignored_choices(ignored: bool = True) -> Generator[None]:
    """In this block nothing is read, so that all is timed anew and written over what was there."""
    token = _IGNORED.set(ignored)
    try:
        yield
    finally:
        _IGNORED.reset(token)


def cache_folder() -> Path:
    """`GROWFX_CACHE`, else `growfx` in `XDG_CACHE_HOME`, else `~/.cache/growfx`."""
    named = os.environ.get("GROWFX_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a path that is not absolute is to be ignored.
    base = Path(home) if home and os.path.isabs(home) else Path("~/.cache").expanduser()
    return base / "growfx"


def read_choices(key: Mapping[str, Any]) -> Any:
    """The JSON value that was written under this key; None if there is none, and in `ignored_choices`."""
    if _IGNORED.get():
        return None
    file = _file(key)
    try:
        if file.stat().st_size > _LARGEST:
            return None
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    same = isinstance(content, dict) and content.get("key") == json.loads(json.dumps(key))
    return content.get("value") if same else None


def write_choices(key: Mapping[str, Any], value: Any) -> str:
    """Keep a JSON value; returns "" or the reason why it cannot be kept."""
    file = _file(key)
    text = json.dumps({"key": dict(key), "value": value}, indent=1)
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        return f"the choice was not kept: `{file.parent}` cannot be written ({error.strerror or error})"
    return ""


def _file(key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "lowering" / f"{digest[:32]}.json"
