"""The notebooks are their tutorials, and run."""

import importlib.util
import json
from pathlib import Path

import pytest
from places import ROOT

spec = importlib.util.spec_from_file_location("to_notebook", ROOT / "docs" / "to_notebook.py")
to_notebook = importlib.util.module_from_spec(spec)
spec.loader.exec_module(to_notebook)


def kept(name: str) -> Path:
    return ROOT / "docs" / "notebooks" / f"{name}.ipynb"


@pytest.mark.parametrize("name", to_notebook.NOTEBOOKS)
def test_a_notebook_has_the_text_and_code_of_its_page(name: str) -> None:
    page = (ROOT / "docs" / to_notebook.NOTEBOOKS[name]).read_text()
    assert json.loads(kept(name).read_text()) == to_notebook.notebook(page), "run `python docs/to_notebook.py`"


@pytest.mark.slow
@pytest.mark.parametrize("name", to_notebook.NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    content = nbformat.read(kept(name), as_version=4)
    nbformat.validate(content)
    done = nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")
