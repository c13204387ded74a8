"""What the files around the code say agrees with the code and with each other."""

import re
import subprocess
import sys
import tomllib

import yaml
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
MADE = {"docs/_generated/"}  # when the site is built
MATRIX = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]


def test_ci_tests_the_oldest_python_that_is_allowed_with_old_and_new_libraries() -> None:
    floor = PROJECT["requires-python"].removeprefix(">=")
    assert MATRIX["python"][0] == floor
    assert {"python": floor, "libraries": "oldest"} in MATRIX["include"]
    assert "newest" in MATRIX["libraries"]


def test_the_oldest_libraries_are_those_of_the_project() -> None:
    shown = subprocess.run(
        [sys.executable, ROOT / ".github" / "oldest.py"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.replace("==", ">=").removesuffix(".*") for line in shown] == PROJECT["dependencies"]


def test_hooks_run_the_tools_of_the_makefile_from_its_environment() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = {" ".join(hook["entry"].split()[:2]) for hook in hooks}
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    assert entries == {".venv/bin/ruff check", ".venv/bin/ruff format", ".venv/bin/basedpyright"}
    assert {entry for entry in entries if entry not in makefile} == set()


def test_the_citation_names_the_project_and_its_license() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == [{"name": "The growfx developers"}]
    assert citation["title"].startswith(PROJECT["name"])


def test_no_text_installs_growfx_from_a_package_index() -> None:
    """Growfx is installed from a clone: `pip install .`, `pip install '.[onnx]'`."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    files += [file for folder in ("growfx", "passes") for file in (ROOT / folder).rglob("*.py")]
    claims = [str(f.relative_to(ROOT)) for f in files if re.search(r"pip install ['\"]?growfx", f.read_text())]
    assert claims == []


def test_links_and_paths_in_the_guides_exist() -> None:
    pages = [page for page in (ROOT / "docs").rglob("*.md") if "_generated" not in page.parts]
    for guide in (ROOT / "CONTRIBUTING.md", ROOT / "README.md", *pages):
        text = guide.read_text()
        links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
        assert {link for link in links if not (guide.parent / link).exists()} == set(), guide.name
        named = re.findall(r"`((?:growfx|passes|tests|docs|benchmarks|examples)/[\w/.-]+)`", text)
        named = [path for path in named if path not in MADE]
        assert {path for path in named if not (ROOT / path).exists()} == set(), guide.name
