"""What the pages show is what happens: every block of code runs, or says why not."""

import ast
import re
from pathlib import Path

import click
import pytest
from doc_pages import blocks, commands, run, run_here
from places import ROOT

from growfx.cli import commands as growfx

DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "_generated" not in page.parts]
WITH_CODE = [page for page in PAGES if blocks(page)]
# Python alone, and quick; the others start processes and train in them.
QUICK = {"index", "recording", "own_loop", "write_method", "read_artifact", "path_products", "artifact"}


def named(page: Path) -> str:
    return str(page.relative_to(DOCS).with_suffix(""))


def run_pages(*, quick: bool) -> list[Path]:
    """The pages with a block that runs, by how long they take."""
    some = [page for page in WITH_CODE if any(block.reason is None for block in blocks(page))]
    return [page for page in some if (page.stem in QUICK) == quick]


@pytest.mark.parametrize("page", run_pages(quick=True), ids=named)
def test_a_page_of_python_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {block.language for block in blocks(page) if block.reason is None} == {"python"}
    monkeypatch.chdir(tmp_path)
    run_here(page, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", run_pages(quick=False), ids=named)
def test_a_session_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    run(page, tmp_path)


@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_every_command_line_is_taken_and_every_block_of_python_is_python(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.code.replace(", ...)", ")"))
            continue
        for name, *words in commands(block):
            if name == "torchrun":
                name, *words = words[words.index("-m") + 1 :]
            if name == "growfx":
                command = growfx.commands[words[0]]
                try:
                    command.make_context(words[0], list(words[1:]))
                except click.UsageError as error:
                    pytest.fail(f"growfx {' '.join(words)}: {error.message}")


def test_pages_write_to_different_places_so_that_all_can_be_followed_in_one_folder() -> None:
    pattern = re.compile(
        r"(?:--(?:out|native|web) |\bout=\"|\b(?:save|export_native|export_web)\([^,()]+, \")([\w./-]+)"
    )
    writers: dict[str, set[str]] = {}
    for page in WITH_CODE:
        for block in blocks(page):
            if block.reason is None:
                for place in pattern.findall(block.code):
                    writers.setdefault(place, set()).add(named(page))
    assert len(writers) > 10
    assert {place: pages for place, pages in writers.items() if len(pages) > 1} == {}


def test_what_is_not_run_says_why() -> None:
    reasons = [block.reason for page in WITH_CODE for block in blocks(page) if block.reason is not None]
    assert reasons
    assert min(len(reason) for reason in reasons) > 10


def test_every_tutorial_is_run() -> None:
    tutorials = {page for page in PAGES if page.parent.name == "tutorials" and page.stem != "index"}
    assert len(tutorials) >= 7
    assert tutorials <= {*run_pages(quick=True), *run_pages(quick=False)}
