"""Build HTML and SVG elements whose texts and attributes are escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

__all__ = ["Cell", "Markup", "bar", "facts_table", "join", "sortable_table", "tag"]

# Neither XML nor HTML can hold these: control characters, and halves of characters from undecodable file names.
_UNPRINTABLE: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """Return a value as text of an element or of an attribute; markup unchanged."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(_UNPRINTABLE.sub("\ufffd", str(value)), quote=True))


def join(parts: Iterable[object]) -> Markup:
    """Return the parts one after the other, each escaped unless it is markup."""
    return Markup("".join(escaped(part) for part in parts))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """Return one element; children and attribute values are escaped, attributes of None are left out.

    In attribute names `_` stands for `-`, and one at the end is dropped (`class_`).
    """
    given = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    opening = name + "".join(f' {key}="{_quoted(value)}"' for key, value in given)
    return Markup(f"<{opening}>{join(children)}</{name}>")


def _quoted(value: object) -> str:
    """Return an attribute's value; markup has no meaning there."""
    return escaped(str.__str__(value) if isinstance(value, Markup) else value)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, and the number that rows are sorted by (None: by the text)."""

    shown: object
    value: float | None = None


def sortable_table(head: Sequence[str], rows: Iterable[Sequence[Cell | str]]) -> Markup:
    """Return a table that a click on a column's head sorts; it scrolls sideways on narrow screens."""
    buttons = [tag("th", tag("button", name, type="button"), scope="col") for name in head]
    body = [tag("tr", *(_cell(cell) for cell in row)) for row in rows]
    content = tag("table", tag("thead", tag("tr", *buttons)), tag("tbody", *body), class_="sort")
    return tag("div", content, class_="wide")


def _cell(cell: Cell | str) -> Markup:
    if isinstance(cell, str):
        return tag("td", cell)
    number = None if cell.value is None else repr(float(cell.value))
    return tag("td", cell.shown, data_value=number, class_=None if number is None else "number")


def facts_table(facts: Iterable[tuple[str, object]]) -> Markup:
    """Return names and values below each other."""
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in facts]
    return tag("div", tag("table", tag("tbody", *rows), class_="facts"), class_="wide")


def bar(share: float, text: str) -> Markup:
    """Return `text` over a bar of this share (0 to 1) of the full length."""
    width = f"{100 * min(max(share, 0.0), 1.0):.1f}"
    full = tag("rect", width="100", height="6", class_="trough")
    rect = tag("rect", width=width, height="6", class_="fill")
    picture = tag("svg", full, rect, class_="bar", viewBox="0 0 100 6", preserveAspectRatio="none", aria_hidden="true")
    return join([text, picture])
