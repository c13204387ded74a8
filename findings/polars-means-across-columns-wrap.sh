#!/usr/bin/env bash
# Guess:    polars adds up small integers, quantized weights or pixels, in a wide type across columns as it does down them: the
#           horizontal sum and mean of three columns of 100 in int8 are 300 and 100.
# Happens:  across columns they are added in the columns' own type and wrap around: the sum is 44 and the mean, a float64, 14.67.
#           Two pixels of 200 and 100 in uint8 have a mean of 22. dot() of two int8 columns wraps around as well, and diff(): the
#           step from -100 to 100 is -56. float16 columns of 60,000 have a mean of inf. Nothing is said. Down a column sum, mean,
#           cum_sum, cum_prod, rolling_sum and group_by are right, as are the sum and mean of a list in each row, and the
#           horizontal sum of booleans.
# Seen with polars 2.1.0, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet polars==2.1.0
"$folder/venv/bin/python" - <<'PY'
import warnings

import polars as pl

warnings.simplefilter("error")  # a warning would end the script
print("polars", pl.__version__)


def across(values, dtype):
    frame = pl.DataFrame({f"column {place}": [value] for place, value in enumerate(values)}).cast(dtype)
    found = frame.sum_horizontal().item(), frame.mean_horizontal().item()
    row = frame.select(pl.concat_list(pl.all()).alias("row"))["row"]
    lists = row.list.sum().item(), row.list.mean().item()
    print(f"{dtype} {values}: across columns sum {found[0]}, mean {found[1]:.2f}; as a list {lists[0]}, {lists[1]:.2f}")
    return found, lists


found, lists = across([100, 100, 100], pl.Int8)
assert found[0] == 44 and abs(found[1] - 44 / 3) < 1e-6 and lists == (300, 100), "this has changed"
found, lists = across([200, 100], pl.UInt8)
assert found == (44, 22) and lists == (300, 150), "this has changed"
found, lists = across([True, True, True], pl.Boolean)
assert found == (3, 1), "this has changed"
halves = pl.DataFrame({"a": [60000.0], "b": [60000.0]}).cast(pl.Float16).mean_horizontal().item()
column = pl.Series([100, 100, 100], dtype=pl.Int8)
down = column.sum(), column.mean(), column.cum_sum()[-1], column.rolling_sum(3)[-1]
steps = pl.Series([-100, 100], dtype=pl.Int8).diff()[-1]
print("float16 mean across columns:", halves, "; down a column:", down, "dot", column.dot(column), "diff", steps)
assert halves == float("inf") and down == (300, 100, 300, 300), "this has changed"
assert column.dot(column) == 30000 % 256 == 48 and steps == -56, "this has changed"
groups = pl.DataFrame({"group": [0, 0, 0], "value": column}).group_by("group").agg(pl.col("value").sum())["value"].item()
assert groups == 300, "this has changed"
print("as described")
PY
