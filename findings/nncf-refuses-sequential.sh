#!/usr/bin/env bash
# Guess:    nncf.prune takes any module, an nn.Sequential too.
# Happens:  it adds its hooks to the model as one more child, which a Sequential then calls like the others: prune raises
#           NotImplementedError. A Sequential inside another module works.
# Seen with nncf 3.4.0 and torch 2.15.0, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'nncf==3.4.0'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
from torch import nn

warnings.filterwarnings("ignore")
import nncf


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        return self.layers(x)


def outcome(model):
    try:
        mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
        nncf.prune(model, mode=mode, ratio=0.5, examples_inputs=torch.randn(2, 16))
    except NotImplementedError as error:
        return f"NotImplementedError: {error}"
    return "pruned"


seen = {"Sequential": outcome(Wrapped().layers), "Sequential in a module": outcome(Wrapped())}
for name, found in seen.items():
    print(f"{name}: {found}")
assert seen["Sequential"].startswith("NotImplementedError") and "HookStorage" in seen["Sequential"], "this has changed"
assert seen["Sequential in a module"] == "pruned", "this has changed"
print("as described")
PY
