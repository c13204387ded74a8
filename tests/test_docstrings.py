"""The examples in the docstrings of public names run and show what they say."""

import doctest
import inspect
import os
from pathlib import Path

import pytest
import torch

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
