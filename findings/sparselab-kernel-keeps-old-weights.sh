#!/usr/bin/env bash
# Guess:    whatever writes the parameters of a SparseLab SparseLinear, its next forward computes with them, as an
#           nn.Linear's does.
# Happens:  its kernel reads a buffer of its own, which the parameter shares only until torch gives the parameter other
#           memory. After share_memory(), vector_to_parameters() or load_state_dict(assign=True) the layer goes on with
#           the old weights (and the new bias), without a word; optimizers then train what is never read.
# Seen with sparselab 0.2.2 and torch 2.15.0, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'sparselab==0.2.2'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
from sparselab.nn import SparseLinear
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

warnings.filterwarnings("ignore")
x = torch.randn(5, 64)


def in_place(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)


def shared(layer):
    layer.share_memory()
    in_place(layer)


writes = {
    "in place": in_place,
    "share_memory, in place": shared,
    "vector_to_parameters": lambda layer: vector_to_parameters(
        2 * parameters_to_vector(layer.parameters()), layer.parameters()
    ),
    "load_state_dict(assign=True)": lambda layer: layer.load_state_dict(
        {name: 2 * value for name, value in layer.state_dict().items()}, assign=True
    ),
}
seen = {}
for kind in (nn.Linear, SparseLinear):
    for name, write in writes.items():
        torch.manual_seed(0)
        layer = kind(64, 32)
        before = layer(x).detach()
        write(layer)
        seen[kind.__name__, name] = torch.allclose(layer(x), 2 * before, atol=1e-5)
for (kind, name), doubled in seen.items():
    print(f"{kind}, parameters doubled by {name}: outputs doubled {doubled}")
assert all(seen["Linear", name] for name in writes), "this has changed"
assert [seen["SparseLinear", name] for name in writes] == [True, False, False, False], "this has changed"
print("as described")
PY
