"""The site builds without a warning and without a broken link; its tables are those of the measurements."""

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from places import ROOT

DOCS = ROOT / "docs"
spec = importlib.util.spec_from_file_location("generated", DOCS / "generated.py")
generated = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generated)


@pytest.mark.parametrize("name", generated.PAGES)
def test_a_generated_page_is_text_and_whole_tables(name: str) -> None:
    text = generated.PAGES[name]()
    rows = re.findall(r"(?:^\|.*\|\n)+", text + "\n", flags=re.MULTILINE)
    assert rows or name == "cli"
    for table in rows:
        lines = table.replace("\\|", "").strip().split("\n")
        assert len({line.count("|") for line in lines}) == 1, lines[0]
        assert len(lines) > 2


def test_figures_of_the_pages_are_those_of_the_measurements() -> None:
    rows = [row for row in generated.result("storage")["rows"] if row["format"] == "growfx artifact"]
    page = generated.storage_table()
    line = next(line for line in page.split("\n") if line.startswith("| growfx artifact |"))
    assert [float(cell) for cell in line.split("|")[2:-1]] == [round(row["bytes"] / 1e6, 2) for row in rows]


def test_every_method_and_command_has_its_place() -> None:
    from growfx import methods
    from growfx.cli import commands

    page = generated.method_pages()
    assert [name for name in methods.names() if f"\n## {name}\n" not in page] == []
    page = generated.command_pages()
    assert [name for name in commands.commands if f"## growfx {name}\n" not in page] == []
    assert max(map(len, page.split("\n"))) <= 100


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {found["id"]} if found.get("id") else set()
        self.links += [found[key] for key in ("href", "src") if found.get(key) and tag != "link"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run([*command, str(DOCS), str(tmp_path / "site")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    pages = {}
    for file in site.rglob("*.html"):
        pages[file.resolve()] = Links()
        pages[file.resolve()].feed(file.read_text())
    broken = []
    for file, page in pages.items():
        for link in page.links:
            place, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link) or link.startswith("//"):
                continue
            target = (file.parent / place.partition("?")[0]).resolve() if place else file
            known = target.exists() and (not anchor or target not in pages or anchor in pages[target].anchors)
            broken += [] if known else [f"{file.relative_to(site)}: {link}"]
    assert broken == []
