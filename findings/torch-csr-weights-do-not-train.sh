#!/usr/bin/env bash
# Guess:    a linear layer whose weight is a CSR tensor trains sparsely: its gradient has the weight's pattern, as that of
#           a COO weight has, and SGD and Adam update it.
# Happens:  the gradient of a CSR weight is a dense tensor with values at absent entries too; SGD and Adam raise a
#           RuntimeError at their first step, and copy.deepcopy of the layer does as well.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import copy
import warnings

import torch
from torch import nn

warnings.filterwarnings("ignore")  # CSR is announced as beta
torch.manual_seed(0)
weight = torch.randn(64, 64) * (torch.rand(64, 64) < 0.1)
x = torch.randn(5, 64)

layer = nn.Linear(64, 64, bias=False)
layer.weight = nn.Parameter(weight.to_sparse_csr())
layer(x).sum().backward()
coo = nn.Parameter(weight.to_sparse())
torch.sparse.mm(coo, x.T).sum().backward()
seen = {
    "entries": layer.weight._nnz(),
    "CSR gradient": (str(layer.weight.grad.layout), int(layer.weight.grad.count_nonzero())),
    "COO gradient": (str(coo.grad.layout), coo.grad._nnz()),
}
for name, act in {
    "SGD": lambda: torch.optim.SGD(layer.parameters(), 0.1).step(),
    "Adam": lambda: torch.optim.Adam(layer.parameters()).step(),
    "deepcopy": lambda: copy.deepcopy(layer),
}.items():
    try:
        act()
        seen[name] = "works"
    except RuntimeError as error:
        seen[name] = f"RuntimeError: {error}"
for name, fact in seen.items():
    print(f"{name}: {fact}")
assert seen["CSR gradient"] == ("torch.strided", 64 * 64), "this has changed"
assert seen["COO gradient"] == ("torch.sparse_coo", seen["entries"]), "this has changed"
assert all(seen[name].startswith("RuntimeError") for name in ("SGD", "Adam", "deepcopy")), "this has changed"
print("as described")
PY
