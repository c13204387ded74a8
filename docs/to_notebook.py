"""Make a notebook of a tutorial: its text as cells of Markdown, its blocks of Python as cells of code, no outputs.

`python docs/to_notebook.py` writes those of `NOTEBOOKS` anew; `tests/docs/test_notebooks.py` holds them to their pages.
"""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
NOTEBOOKS = {"grow_digits": "tutorials/grow_digits.md", "read_artifact": "tutorials/read_artifact.md"}
_BLOCK = re.compile(r"^```python\n(.*?)^```\n", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\.md\)")  # to pages of the site, which a notebook does not lie beside


def notebook(page: str) -> dict[str, Any]:
    """The notebook of a page in Markdown, in nbformat 4."""
    cells: list[dict[str, Any]] = []
    for i, part in enumerate(_BLOCK.split(page)):
        text = (part if i % 2 else _LINK.sub(r"\1", part)).strip()
        if not text:
            continue
        cell: dict[str, Any] = {"id": f"cell-{len(cells)}", "metadata": {}, "source": text.splitlines(keepends=True)}
        if i % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        else:
            cell["cell_type"] = "markdown"
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    """Write all notebooks."""
    for name, page in NOTEBOOKS.items():
        content = notebook((DOCS / page).read_text(encoding="utf-8"))
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
        (DOCS / "notebooks" / f"{name}.ipynb").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
