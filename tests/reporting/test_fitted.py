"""Tables that fit the terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growfx.reporting.fitted import fitted_table, short_count, terminal_columns

NAMES = st.text("abc.-_/, 1", min_size=1, max_size=60).filter(str.strip)
ROWS = [{"layer": "stages.0.blocks.11.attention.projection", "active": "1,234,567", "bytes": "9,999", "density": "1 %"}]


@given(st.lists(NAMES, min_size=1, max_size=5), st.integers(40, 120))
def test_a_table_is_no_wider_than_the_terminal_and_loses_no_text(names, columns):
    rows = [{"layer": name, "density": "100.00 %"} for name in names]
    text = fitted_table(rows, columns, wrap=("layer",))
    assert max(map(len, text.split("\n"))) <= columns
    shown = "".join(text.split("\n", 2)[2].replace("100.00 %", "").split())
    assert shown == "".join("".join(names).split())


def test_without_a_terminal_nothing_is_broken():
    assert ROWS[0]["layer"] in fitted_table(ROWS, None, wrap=("layer",), drop=("bytes",))


def test_columns_are_left_out_in_order_and_named_where_breaking_is_not_enough():
    text = fitted_table(ROWS, 36, wrap=("layer",), drop=("bytes", "density"))
    head = text.split("\n")[0]
    assert "bytes" not in head
    assert "density" in head
    assert "left out" in text
    assert "bytes" in text.split("left out")[1]
    assert max(map(len, text.split("\n"))) <= 36
    assert "left out" not in fitted_table(ROWS, 60, wrap=("layer",), drop=("bytes", "density"))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (12_345, "12.3 k"), (999_600, "1 M"), (4.09e9, "4.09 G"), (1e13, "10 T")],
)
def test_counts_are_short(number, text):
    assert short_count(number) == text


def test_the_width_is_that_of_the_environment_and_unknown_in_a_pipe(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert terminal_columns() is None
    monkeypatch.setenv("COLUMNS", "72")
    assert terminal_columns() == 72
