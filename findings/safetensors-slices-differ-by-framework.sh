#!/usr/bin/env bash
# Guess:    get_slice of safetensors' safe_open takes the same slices whatever framework the file is opened for, those of the
#           framework: the last three rows are [-3:], and a slice that goes past the end, as that of the last shard does, ends
#           there.
# Happens:  opened for torch it does, also with steps, lists and masks. Opened for numpy, the same file and the same line: a
#           negative bound is an OverflowError, a bound past the end a SafetensorError, an empty slice a SystemError about the
#           size of a PyByteArray, a list of rows, a mask and None are refused. A file cut into shards by steps of ceil(rows /
#           shards) loads in torch and raises for the last shard in numpy. Whole slices within the bounds, single rows and steps
#           are equal.
# Seen with safetensors 0.8.0, torch 2.15.0 and numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'safetensors==0.8.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import tempfile

import numpy as np
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file

print("safetensors", safetensors.__version__, "torch", torch.__version__, "numpy", np.__version__)
path = tempfile.mkdtemp() + "/weights.safetensors"
weight = torch.arange(40.0).reshape(10, 4)
save_file({"weight": weight}, path)
alike = {
    "[2:5]": np.s_[2:5],
    "[3]": 3,
    "[-1]": -1,
    "[::2]": np.s_[::2],
    "[:, 1]": np.s_[:, 1],
    "[...]": np.s_[...],
    "[2:5, 1:3]": np.s_[2:5, 1:3],
    "[8:]": np.s_[8:],
}
torch_only = {
    "[-3:]": np.s_[-3:],
    "[:-2]": np.s_[:-2],
    "[:, -2:]": np.s_[:, -2:],
    "[8:12], the last of four shards of 10 rows": np.s_[8:12],
    "[5:2], empty": np.s_[5:2],
    "[[1, 3]]": [1, 3],
    "[None]": None,
}


def read(framework, index):
    with safe_open(path, framework) as file:
        return torch.as_tensor(np.asarray(file.get_slice("weight")[index]))


for name, index in alike.items():
    for framework in ("pt", "np"):
        try:
            found = read(framework, index)
        except Exception as error:
            raise AssertionError(f"this has changed: {framework} {name} {error}") from error
        assert torch.equal(found, weight[index]), "this has changed"
print("alike in both:", *alike)
for name, index in torch_only.items():
    assert torch.equal(read("pt", index), weight[index]), "this has changed"
    try:
        read("np", index)
    except Exception as error:  # OverflowError, SafetensorError and SystemError
        print(f"{name}: torch {tuple(weight[index].shape)}, numpy {type(error).__name__}: {str(error)[:70]}")
    else:
        raise AssertionError("this has changed")
print("as described")
PY
