"""What `growfx methods` shows: every method with its defaults, or the options, source and an example of one."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["DENSE", "MAIN", "about_all", "about_one"]

DENSE: Final = "dense"  # no method: all weights are trained
MAIN: Final = "pwmpr"  # what `growfx grow` runs
_COLUMNS: Final = 100  # of text; wider lines are hard to read


def about_all() -> tuple[dict[str, Any], str]:
    """Return the default options of every method, and a table of them."""
    from growfx import methods
    from growfx.commands.flags import method_rows
    from growfx.options import as_json
    from growfx.reporting.fitted import fitted_table

    facts = {name: as_json(methods.create(name)) for name in methods.names()}
    rows = [
        {
            "method": name,
            "options": ", ".join(_with_default(row) for row in method_rows(name)),
            "command": "grow" if name == MAIN else "train",
        }
        for name in facts
    ]
    rows.append({"method": DENSE, "options": "the control: all weights", "command": "train"})
    return {"methods": facts}, fitted_table(rows, _columns(), wrap=("options",))


def about_one(name: str) -> tuple[dict[str, Any], str]:
    """Return the options of one method, its source and an example, and the same as text.

    Raises `ConfigError` for a method that there is not.
    """
    from growfx import methods
    from growfx.commands.flags import method_rows
    from growfx.reporting.fitted import fitted_table

    kind = methods.kind_of(name)
    rows = method_rows(name)
    source = (inspect.getdoc(inspect.getmodule(kind)) or "").strip()
    about = (inspect.getdoc(kind) or "").partition("\n\nAttributes:")[0]
    about = re.sub(r"[;,]\s+options\s+as\s+in\s+`\w+`(,\s+and)?\.?$", ".", about)  # all are listed
    command = "grow MODEL" if name == MAIN else f"train MODEL --method {name}"
    example = f"growfx {command} --data digits --out runs/{name}"
    columns = _columns()
    shown = example if len(example) + 2 <= columns else example.replace(" --data", " \\\n      --data")
    options = fitted_table(rows, columns, wrap=("meaning", "allowed", "default", "flag"))
    about, source = (_filled(part, columns) for part in (about, source))
    text = f"{about}\n\n{options}\n\n{source}\n\nexample:\n  {shown}"
    return {"name": name, "about": about, "source": source, "options": rows, "example": example}, text


def _columns() -> int:
    from growfx.reporting.fitted import terminal_columns

    return min(terminal_columns() or _COLUMNS, _COLUMNS)


def _with_default(row: Mapping[str, str]) -> str:
    """An option of a method with its default; where that is unset, with what it stands for."""
    name, default = row["flag"].removeprefix("--").replace("-", "_"), row["default"]
    return f"{name}={f'({default})' if ' ' in default else default}"


def _filled(text: str, columns: int) -> str:
    """Fill the paragraphs of a docstring anew for a terminal; lists keep their lines."""
    filled = []
    for paragraph in text.split("\n\n"):
        listed = re.search(r"^\s*(\d+\.|[-*])? {2}|^\s*(\d+\.|[-*]) ", paragraph, flags=re.MULTILINE)
        for line in paragraph.split("\n") if listed else [" ".join(paragraph.split())]:
            indent = " " * (len(line) - len(line.lstrip()))
            filled += textwrap.wrap(line, columns, subsequent_indent=indent, break_on_hyphens=False)
        filled.append("")
    return "\n".join(filled).rstrip()
