"""Fit the tables that commands print into the terminal they are printed to."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

__all__ = ["fitted_table", "short_count", "terminal_columns"]

_GAP = 2  # blanks between columns
_TITLE = 2  # what `tabulate` adds to the width of a title
_NARROWEST = 14  # of a column whose text is broken into lines


def terminal_columns() -> int | None:
    """Return the width of the terminal; None where output goes to a file or a program (`COLUMNS` overrides that)."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return None
    return shutil.get_terminal_size().columns


def fitted_table(
    rows: Sequence[Mapping[str, Any]], columns: int | None, *, wrap: Sequence[str] = (), drop: Sequence[str] = ()
) -> str:
    """Return rows of the same keys as a text table of at most `columns` characters a line, where that is possible.

    Args:
        rows: what each line shows, by title.
        columns: the width; None: as wide as the table is.
        wrap: titles whose texts may be broken into lines, down to 14 characters.
        drop: titles that may be left out, the first one first, where breaking lines does not do; a last line names
            them.
    """
    titles = list(rows[0]) if rows else []
    left = [title for title in drop if title in titles]
    dropped: list[str] = []
    while columns is not None and left and _narrowest(rows, titles, wrap) > columns:
        dropped.append(left.pop(0))
        titles.remove(dropped[-1])
    widths = _widths(rows, titles, wrap, columns)
    cells = [["\n".join(_broken(str(row[title]), widths[title])) for title in titles] for row in rows]
    heads = ["\n".join(_broken(title, widths[title] - _TITLE)) for title in titles]
    text = tabulate(cells, headers=heads, disable_numparse=True)
    if not dropped:
        return text
    note = f"left out, as the terminal has {columns} columns: {', '.join(dropped)}; `--json` has all"
    return "\n".join([text, *_broken(note, columns or len(note))])


def short_count(number: float) -> str:
    """Return a count in four digits at most, with k, M, G or T for thousands.

    >>> short_count(999), short_count(231_211_008)
    ('999', '231 M')
    """
    for unit in ("", " k", " M", " G"):
        if number < 999.5:
            return f"{number:.0f}{unit}" if number >= 99.5 or not unit else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def _natural(rows: Sequence[Mapping[str, Any]], title: str) -> int:
    """Width of a column whose title alone is broken into lines."""
    cells = [len(line) for row in rows for line in str(row[title]).split("\n")]
    return max(*cells, *(len(word) + _TITLE for word in title.split()), 0, 0)


def _narrowest(rows: Sequence[Mapping[str, Any]], titles: Sequence[str], wrap: Sequence[str]) -> int:
    widths = [min(_natural(rows, title), _NARROWEST) if title in wrap else _natural(rows, title) for title in titles]
    return sum(widths) + _GAP * (len(titles) - 1)


def _widths(
    rows: Sequence[Mapping[str, Any]], titles: Sequence[str], wrap: Sequence[str], columns: int | None
) -> dict[str, int]:
    """Width of each column: titles give way first, then the widest column that may be broken, one by one."""
    widths = {title: max(_natural(rows, title), len(title) + _TITLE) for title in titles}
    if columns is None:
        return widths
    room = columns - _GAP * (len(titles) - 1)
    for title in titles:
        if sum(widths.values()) > room:
            widths[title] = _natural(rows, title)
    while sum(widths.values()) > room:
        wide = [title for title in wrap if widths.get(title, 0) > _NARROWEST]
        if not wide:
            break
        widths[max(wide, key=lambda title: widths[title])] -= 1
    return widths


def _broken(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, broken behind a blank or a sign of punctuation where there is one."""
    lines: list[str] = []
    for line in text.split("\n"):
        rest = line
        while len(rest) > width:
            cut = rest.rfind(" ", 0, width + 1) + 1 or max(rest.rfind(sign, 0, width) + 1 for sign in ".,_-/") or width
            lines.append(rest[:cut].rstrip())
            rest = rest[cut:].lstrip()
        lines.append(rest)
    return lines
