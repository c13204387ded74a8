#!/usr/bin/env bash
# Guess:    the state dict of a SparseLab SparseLinear restores it: another layer of the same sizes and sparsity that loads
#           it computes the same.
# Happens:  the state dict has values and bias, but not which edges they belong to. Each layer draws a number of edges of
#           its own, so that of 20 others not one can load it (their value vectors have other lengths), and copy.deepcopy
#           and pickle raise a TypeError: a trained layer cannot be brought back.
# Seen with sparselab 0.2.2 and torch 2.15.0, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'sparselab==0.2.2'
"$folder/venv/bin/python" - <<'PY'
import copy
import pickle
import warnings

import torch
from sparselab.nn import SparseLinear

warnings.filterwarnings("ignore")
torch.manual_seed(0)
trained = SparseLinear(64, 32, sparsity=0.9)
loaded = 0
for seed in range(1, 21):
    torch.manual_seed(seed)
    try:
        SparseLinear(64, 32, sparsity=0.9).load_state_dict(trained.state_dict())
        loaded += 1
    except RuntimeError as error:
        message = str(error).splitlines()[-1].strip()
refused = []
for name, act in {"deepcopy": copy.deepcopy, "pickle": pickle.dumps}.items():
    try:
        act(trained)
    except TypeError as error:
        refused.append(name)
        print(f"{name}: {error}")
print(f"state dict: {list(trained.state_dict())}; loaded by {loaded} of 20 layers; last error: {message}")
assert list(trained.state_dict()) == ["_values", "bias"] and loaded == 0, "this has changed"
assert refused == ["deepcopy", "pickle"], "this has changed"
print("as described")
PY
