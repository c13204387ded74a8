#!/usr/bin/env bash
# Guess:    after Torch-Pruning has cut a network, an optimizer made before trains the smaller network, or complains.
# Happens:  step() replaces the parameters it cuts by new ones. The optimizer goes on with the old ones without an error:
#           of a pruned network it trains only the parameters that were not cut.
# Seen with torch-pruning 1.6.1 and torch 2.15.0, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torch-pruning==1.6.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
import torch_pruning
from torch import nn

warnings.filterwarnings("ignore")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
pruner = torch_pruning.pruner.MagnitudePruner(
    model,
    torch.randn(1, 8),
    importance=torch_pruning.importance.MagnitudeImportance(p=2),
    pruning_ratio=0.5,
    ignored_layers=[model[2]],
)
pruner.step()
before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
model(torch.randn(32, 8)).square().sum().backward()
optimizer.step()
moved = {name: not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters()}
print("sizes:", {name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
print("moved by the optimizer's step:", moved)
assert moved == {"0.weight": False, "0.bias": False, "2.weight": False, "2.bias": True}, "this has changed"
print("as described")
PY
