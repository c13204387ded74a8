"""The examples in the docstrings of public names run and show what they say."""

import ast
import doctest
import inspect
import os
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from places import ROOT

import growfx

# Imports work in every example, and their files go into an empty folder.
GIVEN = {"growfx": growfx, "torch": torch}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = ("methods", "passes")
PUBLIC = [name for name in growfx.__all__ if name not in MODULES]


def examples(name: str) -> doctest.DocTest:
    text = inspect.getdoc(getattr(growfx, name)) or ""
    return doctest.DocTestParser().get_doctest(text, dict(GIVEN), f"growfx.{name}", None, None)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_that_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GROWFX_CACHE", os.fspath(tmp_path / "cache"))
    if name == "export_onnx":
        pytest.importorskip("onnxscript")
    test = examples(name)
    assert any(f"growfx.{name}" in example.source for example in test.examples)
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["create", "names", "kind_of", "Method"])
def test_a_public_name_of_the_methods_has_an_example_that_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect.getdoc(getattr(growfx.methods, name)) or ""
    test = doctest.DocTestParser().get_doctest(text, dict(GIVEN), f"growfx.methods.{name}", None, None)
    assert any(f"methods.{name}" in example.source or "method." in example.source for example in test.examples)
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out


def docstrings() -> set[tuple[str, str]]:
    """The dotted names of growfx in docstrings, each with the file it stands in."""
    files = [file for folder in ("growfx", "passes") for file in (ROOT / folder).rglob("*.py")]
    nodes = [(str(file.relative_to(ROOT)), node) for file in files for node in ast.walk(ast.parse(file.read_text()))]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [(file, ast.get_docstring(node) or "") for file, node in nodes if isinstance(node, kinds)]
    return {(file, name) for file, text in texts for name in re.findall(r"`(growfx(?:\.\w+)+)[`(]", text)}


def test_names_of_growfx_in_docstrings_exist() -> None:
    named = docstrings()
    assert len(named) > 50
    assert {(file, name) for file, name in named if not _exists(name)} == set()


def _exists(name: str) -> bool:
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False
