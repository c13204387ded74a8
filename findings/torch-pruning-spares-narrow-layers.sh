#!/usr/bin/env bash
# Guess:    Torch-Pruning's pruner with pruning_ratio=0.9 leaves about a tenth of each layer's channels and at least one; a higher
#           ratio leaves fewer.
# Happens:  a layer of which the ratio would leave less than one channel is not cut at all, without a word: of widths 4, 8, 16 and
#           64, 0.9 leaves 4, 8, 1 and 6, so that the narrow layers stay whole, and 0.97 leaves 4, 8, 16 and 1. In ten iterative
#           steps to the same ratio they are cut, down to one channel for 0.9.
# Seen with torch-pruning 1.6.1, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torch-pruning==1.6.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import torch
import torch_pruning
from torch import nn

widths = (4, 8, 16, 64)


def pruned(ratio, steps):
    """The widths that are left of a network of linear layers."""
    torch.manual_seed(0)
    layers, before = [], 10
    for width in widths:
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    model = nn.Sequential(*layers, nn.Linear(before, 3))
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        torch.randn(1, 10),
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=ratio,
        iterative_steps=steps,
        ignored_layers=[model[-1]],
    )
    for _ in range(steps):
        pruner.step()
    return [layer.out_features for layer in model[:-1] if isinstance(layer, nn.Linear)]


print("widths", list(widths))
seen = {(ratio, steps): pruned(ratio, steps) for ratio in (0.5, 0.9, 0.97) for steps in (1, 10)}
for (ratio, steps), left in seen.items():
    print(f"pruning_ratio={ratio}, steps {steps}: {left}")
assert seen[0.5, 1] == seen[0.5, 10] == [2, 4, 8, 32], "this has changed"
assert seen[0.9, 1] == [4, 8, 1, 6] and seen[0.9, 10] == [1, 1, 1, 6], "this has changed"
assert seen[0.97, 1] == [4, 8, 16, 1], "this has changed"
print("as described")
PY
