"""The shape of the code base: which package may import which, no circles, and a house that is whole.

All imports count: at the top of a file, inside functions and under `TYPE_CHECKING`.
"""

import ast
import importlib
import itertools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import growfx

ROOT = Path(__file__).parent.parent
NOUNS, VERBS = ROOT / "growfx", ROOT / "passes"

# From the bottom up. A file imports from levels below and from its own package, never from another package of its own
# level or above.
LEVELS = [
    ["errors", "version"],
    ["options", "machine", "distributed", "notices", "quiet", "file_paths"],
    ["recorded"],
    ["masked"],
    ["selection", "analysis", "models", "compaction", "runtime"],
    ["artifact", "runs", "data"],
    ["passes"],
    ["methods"],
    ["reporting", "deploy"],
    ["training"],
    ["commands"],
    ["cli", "lightning", "hf_trainer"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# The table of the zoo checks what users get, so it uses what they use.
USES_THE_PUBLIC_FACE = {"growfx.commands.zoo.check"}
MOST_MODULES = 20


def modules() -> dict[str, Path]:
    found = {}
    for folder, prefix in ((NOUNS, "growfx"), (VERBS, "growfx.passes")):
        for file in folder.rglob("*.py"):
            if folder is NOUNS and "passes" in file.relative_to(NOUNS).parts:
                continue
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *(p for p in parts if p != "__init__")])] = file
    return found


MODULES = modules()


def imports(file: Path) -> set[str]:
    """Names of growfx modules that `file` imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name if name in MODULES else name.rpartition(".")[0] for name in found} & set(MODULES)


GRAPH = {name: imports(file) - {name} for name, file in MODULES.items() if name != "growfx"}


def package(module: str) -> str:
    return module.split(".")[1]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that are left when those that import nothing else that is left are taken away, again and again."""
    left = dict(graph)
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_a_module_imports_from_levels_below_and_from_its_own_package(module: str) -> None:
    own = package(module)
    others = {name for name in GRAPH[module] - {"growfx"} if package(name) != own}
    assert not {name for name in others if LEVEL[package(name)] >= LEVEL[own]}
    assert "growfx" not in GRAPH[module] or module in USES_THE_PUBLIC_FACE


def test_there_are_no_import_circles() -> None:
    assert not circles(GRAPH)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def folders() -> Iterator[Path]:
    for top in (NOUNS, VERBS):
        inside = {file.parent for file in MODULES.values() if file.is_relative_to(top)}
        yield from sorted(inside)


@pytest.mark.parametrize("folder", list(folders()), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_no_folder_has_more_modules_than_one_can_take_in(folder: Path) -> None:
    assert len([file for file in folder.glob("*.py") if file.stem != "__init__"]) <= MOST_MODULES
    assert (folder / "__init__.py").is_file()


def test_every_package_folder_is_listed_for_the_build() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({name for name, file in MODULES.items() if file.stem == "__init__"})


def test_no_module_bears_the_name_of_a_function_that_its_package_exports() -> None:
    """`import a.b.c` would give the module where the function was meant."""
    for name, file in MODULES.items():
        if file.stem == "__init__" and name not in ("growfx", "growfx.passes"):
            exported = getattr(importlib.import_module(name), "__all__", [])
            assert not set(exported) & {other.stem for other in file.parent.glob("*.py")}, name


def test_every_pass_is_listed_with_a_function_that_exists() -> None:
    for file, function in growfx.passes.PASSES.items():
        assert callable(getattr(importlib.import_module(f"growfx.passes.{file}"), function))
    there = {file.stem for file in VERBS.glob("*.py")} | {file.parent.name for file in VERBS.glob("*/__init__.py")}
    assert there - set(growfx.passes.PASSES) == {"__init__", "operators", "trials"}


def test_the_link_for_type_checkers_is_relative_and_points_at_passes() -> None:
    assert (NOUNS / "passes").is_symlink()
    assert (NOUNS / "passes").readlink() == Path("../passes")


def test_the_public_names_are_sorted_and_all_there() -> None:
    assert growfx.__all__ == sorted(growfx.__all__)
    assert all(getattr(growfx, name) is not None for name in growfx.__all__)
    assert set(growfx.__all__) <= set(dir(growfx))
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        growfx.prune  # noqa: B018


def test_the_version_stands_in_one_place() -> None:
    texts = [file.read_text() for file in itertools.chain(MODULES.values(), [ROOT / "pyproject.toml"])]
    assert sum(f'"{growfx.__version__}"' in text for text in texts) == 1


def test_importing_growfx_is_light() -> None:
    code = "import sys, growfx; print([m for m in ('torch', 'timm', 'scipy', 'matplotlib') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_wrapping_imports_no_library_of_models() -> None:
    code = (
        "import sys, torch, growfx; growfx.wrap(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.randn(1, 2))\n"
        "print([m for m in ('timm', 'torchvision', 'scipy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("file", sorted(MODULES.values()), ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_files_and_functions_are_short_enough_to_read(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 720
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name
