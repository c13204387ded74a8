"""The shape of the code base: which module may import which, and that the package is whole."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import growfx

ROOT = Path(__file__).parent.parent
NOUNS, VERBS = ROOT / "growfx", ROOT / "passes"

# From the command line down; a module imports from its own level or below, never from above.
LEVELS = [
    {"growfx.errors"},
    {"growfx.*"},
    {"growfx.passes.*", "growfx.passes"},
    {"growfx.methods.*", "growfx.methods"},
    {
        "growfx.training.start",
        "growfx.training.run",
        "growfx.training.step",
        "growfx.training.state",
        "growfx.training.evaluation",
        "growfx.training.recipe",
        "growfx.commands.inspection",
        "growfx.commands.job",
        "growfx.deploy.onnx",
        "growfx.deploy.saving",
        "growfx.training.foreign_loop",
        "growfx.hf_trainer",
        "growfx.lightning",
        "growfx.deploy.loading",
    },
    {"growfx.commands.bench.measure", "growfx.commands.bench.subject", "growfx.commands.bench.variants"},
    {
        "growfx.commands.zoo.coverage",
        "growfx.commands.zoo.check",
        "growfx.commands.zoo.pool",
        "growfx.commands.compare.comparison",
        "growfx.commands.compare.pool",
    },
    {"growfx.cli", "growfx.__main__"},
]


def modules() -> dict[str, Path]:
    found = {}
    for folder, prefix in ((NOUNS, "growfx"), (VERBS, "growfx.passes")):
        for file in folder.rglob("*.py"):
            if folder is NOUNS and "passes" in file.relative_to(NOUNS).parts:
                continue
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *(p for p in parts if p != "__init__")])] = file
    return found


def imports(file: Path, at_load: bool) -> set[str]:
    """Names of growfx modules that `file` imports; `at_load`: only what importing it imports."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if at_load and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(file.read_text()))
    names = modules()
    return {name if name in names else name.rpartition(".")[0] for name in found} & set(names)


def level(module: str) -> int:
    ranks = [
        i
        for i, patterns in enumerate(LEVELS)
        for p in patterns
        if p == module or (p.endswith(".*") and module.startswith(p[:-1]))
    ]
    exact = [i for i, patterns in enumerate(LEVELS) if module in patterns]
    return exact[0] if exact else max(ranks)


@pytest.mark.parametrize("module", sorted(set(modules()) - {"growfx"}))
def test_no_module_imports_from_a_level_above_its_own(module: str) -> None:
    above = {name for name in imports(modules()[module], at_load=False) - {"growfx"} if level(name) > level(module)}
    assert not above


def test_there_are_no_import_circles() -> None:
    graph = {name: imports(file, at_load=True) - {name} for name, file in modules().items() if name != "growfx"}
    while graph:
        free = [name for name, needs in graph.items() if not needs & set(graph)]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_every_package_folder_is_listed_for_the_build() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {"growfx"} | {f"growfx.{f.parent.name}" for f in NOUNS.glob("*/__init__.py")}
    assert set(listed) == folders
    assert not [f for f in VERBS.iterdir() if f.is_dir() and f.name != "__pycache__"], "passes/ is flat"


def test_every_pass_is_listed_with_a_function_that_exists() -> None:
    for file, function in growfx.passes.PASSES.items():
        assert callable(getattr(importlib.import_module(f"growfx.passes.{file}"), function))
    patterns = ("path_*.py", "connect_*.py", "compact_*.py", "lower_*.py")
    helpers = {f.stem for pattern in patterns for f in VERBS.glob(pattern)} | {"__init__"}
    assert {f.stem for f in VERBS.glob("*.py")} - helpers <= set(growfx.passes.PASSES)


def test_the_link_for_type_checkers_is_relative_and_points_at_passes() -> None:
    assert (NOUNS / "passes").is_symlink()
    assert (NOUNS / "passes").readlink() == Path("../passes")


def test_the_public_names_are_sorted_and_all_there() -> None:
    assert growfx.__all__ == sorted(growfx.__all__)
    assert all(getattr(growfx, name) is not None for name in growfx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        growfx.prune  # noqa: B018


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


@pytest.mark.parametrize("file", sorted(modules().values()), ids=lambda f: f.stem)
def test_files_and_functions_are_short_enough_to_read(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 720
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name
