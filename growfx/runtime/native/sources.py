"""The files of the native runtime, as they leave with a network."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SOURCE_FOLDER", "source_files"]

SOURCE_FOLDER = Path(__file__).parent
_KINDS = (".c", ".cpp", ".h", ".inc", ".txt")


def source_files() -> list[Path]:
    """C++ sources, headers, the example and `CMakeLists.txt`, sorted by name."""
    return sorted(file for file in SOURCE_FOLDER.iterdir() if file.suffix in _KINDS)
