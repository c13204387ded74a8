#!/usr/bin/env bash
# Guess:    who sets pruned weights to zero after each step of a schedule-free optimizer, and their gradients before it, has zeros
#           in evaluation too: averages of zeros.
# Happens:  the parameter is only one of two sequences that the optimizer keeps; the other, z in its state, has the values from
#           before the pruning and gets no mask. optimizer.eval() moves each parameter away from z, so that all pruned weights
#           come back at once, with the opposite sign and a ninth of what they were (momentum 0.9), however long the masks were
#           applied. The model that is evaluated and saved is dense. With z masked as well, once, zeros stay zeros.
# Seen with schedulefree 1.4.1, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'schedulefree==1.4.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import schedulefree
import torch
from torch import nn

optimizers = {
    "AdamWScheduleFree": lambda parameters: schedulefree.AdamWScheduleFree(parameters, lr=0.05),
    "SGDScheduleFree": lambda parameters: schedulefree.SGDScheduleFree(parameters, lr=1.0),
}


def trained(make, z_too):
    """The shares of zeros in training and in evaluation, and pruned weights in parts of what they were."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 32, bias=False)
    inputs = torch.randn(256, 32)
    targets = inputs @ torch.randn(32, 32)
    optimizer = make(layer.parameters())
    optimizer.train()
    mask = torch.ones(32, 32)
    for step in range(400):
        if step == 100:
            mask = (layer.weight.abs() > layer.weight.abs().median()).float()
            old = optimizer.state[layer.weight]["z"].clone()
            if z_too:
                optimizer.state[layer.weight]["z"].mul_(mask)
        optimizer.zero_grad()
        (layer(inputs) - targets).square().mean().backward()
        layer.weight.grad.mul_(mask)
        optimizer.step()
        with torch.no_grad():
            layer.weight.mul_(mask)
    training = float((layer.weight == 0).float().mean())
    optimizer.eval()
    parts = (layer.weight.detach() / old)[mask == 0]
    return training, float((layer.weight == 0).float().mean()), float(parts.min()), float(parts.max())


print("schedulefree", version("schedulefree"), "torch", torch.__version__)
for name, make in optimizers.items():
    seen = {z_too: trained(make, z_too) for z_too in (False, True)}
    for z_too, (training, evaluation, lowest, highest) in seen.items():
        print(
            f"{name}, z masked too: {z_too}: zeros in training {training:.2f}, in evaluation {evaluation:.2f};", end=" "
        )
        print(f"pruned weights are {lowest:.3f} to {highest:.3f} of what they were")
    assert seen[False][:2] == (0.5, 0) and seen[True][:2] == (0.5, 0.5), "this has changed"
    assert -0.112 < seen[False][2] <= seen[False][3] < -0.11, "this has changed"
print("as described")
PY
