"""Warnings of others are ignored in one way."""

from __future__ import annotations

import ast
from pathlib import Path

import growfx

# Whole processes of their own, or the one place that all others go through.
MAY = {"quiet.py", "cli.py"}


def test_only_one_file_of_the_library_puts_filters_of_the_process_back() -> None:
    root = Path(growfx.__file__).parent
    found = {
        path.name
        for folder in (root, root / "methods", root / "passes")
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("catch_warnings", "simplefilter")
    }
    assert found <= MAY
    assert "quiet.py" in found
