#!/usr/bin/env bash
# Guess:    a Hugging Face dataset with_format("numpy") gives arrays of the type that its features name, a float64 column as
#           float64 and an int64 one as int64; only frameworks without a type get another one.
# Happens:  numpy batches have float32 for every float column, so that a time stamp or a count of edges kept as float64 loses all
#           past seven digits; a single item of the same column, ds["t"][0] or ds[0]["t"], is float64. torch's format does the
#           same. jax's makes int32 of int64, and 2^40 + 5 is 5. uint8 pixels and int8 weights become int64, eight times the
#           memory. map() on a dataset in numpy format writes the shortened numbers into the new one. Nothing is said.
#           with_format("numpy", dtype=np.float64) keeps floats (and makes floats of integers); the arrow and pandas formats keep
#           all.
# Seen with datasets 5.2.0, numpy 2.4.6, torch 2.15.0 and jax 0.10.2, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet datasets==5.2.0 'torch==2.15.0' 'jax==0.10.2' 'numpy==2.4.6'
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import datasets
import numpy as np

datasets.disable_progress_bars()
columns = {"t": [16777217.0, 0.1], "id": [2**40 + 5, 3], "pixel": np.array([200, 3], np.uint8)}
dataset = datasets.Dataset.from_dict(columns)
print("datasets", datasets.__version__, {name: feature.dtype for name, feature in dataset.features.items()})
seen = {}
for form in ("numpy", "torch", "jax"):
    batch = dataset.with_format(form)[:]
    seen[form] = {name: (str(values.dtype).removeprefix("torch."), values[0].item()) for name, values in batch.items()}
    print(form, seen[form])
    assert seen[form]["t"] == ("float32", 16777216), "this has changed"
    assert seen[form]["pixel"][0] == ("int32" if form == "jax" else "int64"), "this has changed"
    assert seen[form]["id"][1] == (5 if form == "jax" else 2**40 + 5), "this has changed"
arrays = dataset.with_format("numpy")
items = arrays["t"][0], arrays[0]["t"]
print("single items:", [(item.dtype, item) for item in items])
assert all(item.dtype == np.float64 and item == 16777217 for item in items), "this has changed"
copied = arrays.map(lambda row: {"copy": row["t"]}, batched=True).with_format(None)
print("copied by map:", copied["copy"][:], copied.features["copy"].dtype)
assert copied["copy"][0] == 16777216 and copied.features["copy"].dtype == "float32", "this has changed"
wide = dataset.with_format("numpy", dtype=np.float64)[:]
pandas = dataset.with_format("pandas")[:]
print("dtype=np.float64:", wide["t"].dtype, wide["t"][0], wide["id"].dtype, "; pandas:", dict(pandas.dtypes.astype(str)))
assert wide["t"][0] == 16777217 and pandas["t"].dtype == np.float64 and pandas["pixel"].dtype == np.uint8, "this has changed"
print("as described")
PY
