"""The blocks of code in pages of Markdown, and a run of a whole page."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import ROOT

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_RUNNERS = {"growfx": "growfx", "torchrun": "torch.distributed.run"}


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its text, and why it is not run (None: it is)."""

    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """All blocks of a page that are Python or shell, in order."""
    found = [Block(m["language"], m["code"], m["reason"]) for m in _BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in found if block.language in ("python", "sh")]


def commands(block: Block) -> Iterator[list[str]]:
    """The command lines of a block of shell, split into words; comments are left out."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def script(page: Path) -> str:
    """A Python script that does what a page shows, in order: its Python, and its commands as processes."""
    parts = ["import subprocess, sys\n"]
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.language == "python":
            parts.append(block.code)
            continue
        for name, *words in commands(block):
            command = ["-m", _RUNNERS[name], *words]
            parts.append(f"subprocess.run([sys.executable, *{command!r}], check=True, stdout=subprocess.DEVNULL)\n")
    return "\n".join(parts)


def run_here(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Python of a page in this process, as a module of its name."""
    module = types.ModuleType(page.stem)
    monkeypatch.setitem(sys.modules, page.stem, module)  # dataclasses look their annotations up there
    code = "\n".join(block.code for block in blocks(page) if block.reason is None and block.language == "python")
    exec(compile(code, str(page), "exec"), module.__dict__)


def run(page: Path, folder: Path) -> str:
    """Run a page in an empty folder; what it printed. Fails with the page's own error."""
    (folder / "page.py").write_text(script(page), encoding="utf-8")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
