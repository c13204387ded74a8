#!/usr/bin/env bash
# Guess:    a table made of rows (a list of dicts, as an experiment log holds them) has a column for every key that a row has,
#           and the numbers of the rows, or it raises: accuracy is logged each second epoch, a value is 1 at first and 1.5 later.
# Happens:  pyarrow's Table.from_pylist and datasets' from_list and from_generator have the keys of the first row only; all other
#           values are gone, and nothing is said. polars looks at the first 100 rows: a key that comes later is lost, from a list
#           of dicts and from a file of JSON lines, and a column of integers up to there is one of integers: 1.5 becomes 1.
#           pandas, pyarrow.json, and polars with infer_schema_length=None have all of it.
# Seen with pyarrow 26.0.1, datasets 5.2.0, polars 2.1.0, pandas 3.1.1, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyarrow==26.0.1 datasets==5.2.0 polars==2.1.0 pandas==3.1.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
import os
import warnings

os.environ["HF_HOME"] = os.getcwd()
import datasets
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.json

datasets.disable_progress_bars()
warnings.simplefilter("error")  # a warning would end the script
print("pyarrow", pa.__version__, "datasets", datasets.__version__, "polars", pl.__version__)


def log(epochs, first):
    return [{"epoch": epoch, "score": 1} | ({"accuracy": 0.5} if epoch >= first else {}) for epoch in range(epochs)]


def produce():
    yield from log(4, first=1)


short, long = log(4, first=1), log(200, first=150)
with open("log.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in long)
lost = {
    "pyarrow Table.from_pylist": pa.Table.from_pylist(short).column_names,
    "datasets from_list": datasets.Dataset.from_list(short).column_names,
    "datasets from_generator": datasets.Dataset.from_generator(produce).column_names,
    "polars DataFrame": pl.DataFrame(long).columns,
    "polars read_ndjson": pl.read_ndjson("log.jsonl").columns,
}
kept = {
    "polars DataFrame of 4 rows": pl.DataFrame(short).columns,
    "polars DataFrame, infer_schema_length=None": pl.DataFrame(long, infer_schema_length=None).columns,
    "pandas DataFrame": list(pd.DataFrame(long)),
    "pyarrow.json": pyarrow.json.read_json("log.jsonl").column_names,
}
for name, columns in (lost | kept).items():
    print(f"{name}: {columns}")
assert all(columns == ["epoch", "score", "accuracy"] for columns in kept.values())
assert all(columns == ["epoch", "score"] for columns in lost.values()), "this has changed"
scores = [{"score": 1}] * 150 + [{"score": 1.5}] * 3
print("polars, 1.5 after 150 integers:", pl.DataFrame(scores)["score"][-1])
assert pl.DataFrame(scores)["score"][-1] == 1, "this has changed"
assert pl.DataFrame(scores, infer_schema_length=None)["score"][-1] == 1.5
print("as described")
PY
