#!/usr/bin/env bash
# Guess:    Adafactor divides each gradient by the root of its own second moment, as Adam does, only that the moment is stored as
#           one number a row and one a column. So a kept weight of a pruned layer, where gradients of absent edges are zero, takes
#           steps as long as a dense layer's: the learning rate carries over.
# Happens:  the numbers of rows and columns are means over all their places, zeros of absent edges included. The second moment of a
#           kept weight comes out too small by the density, and its step too long by one over the root of it: three times at 10 %,
#           nine times at 1 %. Adafactor's clipping, by the mean square of the step over all places, does not see it, for the same
#           reason. So it is with timm's and with transformers' Adafactor as it is set for fine-tuning, scale_parameter off.
#           torch's always multiplies the step by the weight's own mean square root, and transformers' by default: that one is too
#           small for the same zeros, and the two errors cancel. Adam takes the same step at every density.
# Seen with torch 2.15.0, transformers 5.24.0, timm 1.0.31 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'timm==1.0.31' 'transformers==5.24.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import timm
import torch
import transformers
from timm.optim import create_optimizer_v2
from torch import nn
from transformers.optimization import Adafactor

fixed = {"relative_step": False, "warmup_init": False, "lr": 1e-3}
optimizers = {
    "timm adafactor": lambda weights: create_optimizer_v2(weights, opt="adafactor", lr=1e-3, weight_decay=0.0),
    "timm adafactorbv": lambda weights: create_optimizer_v2(weights, opt="adafactorbv", lr=1e-3, weight_decay=0.0),
    "transformers Adafactor": lambda weights: Adafactor(weights, scale_parameter=False, **fixed),
    "transformers Adafactor, scaled": lambda weights: Adafactor(weights, scale_parameter=True, **fixed),
    "torch Adafactor": lambda weights: torch.optim.Adafactor(weights, lr=1e-3, weight_decay=0.0),
    "torch Adam": lambda weights: torch.optim.Adam(weights, lr=1e-3),
}
grow = {"timm adafactor", "timm adafactorbv", "transformers Adafactor"}


def step_length(make, density):
    """Root mean square of the steps of kept weights."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(256, 256, generator=generator) < density).float()
    weight = nn.Parameter(torch.randn(256, 256, generator=generator) * mask)
    optimizer = make([weight])
    lengths = []
    for step in range(30):
        before = weight.detach().clone()
        weight.grad = torch.randn(256, 256, generator=generator) * mask
        optimizer.step()
        if step >= 10:
            lengths.append(float((weight.detach() - before)[mask > 0].square().mean().sqrt()))
    assert not weight.detach()[mask == 0].any(), "this has changed"
    return sum(lengths) / len(lengths)


print("torch", torch.__version__, "transformers", transformers.__version__, "timm", timm.__version__)
for name, make in optimizers.items():
    steps = [step_length(make, density) for density in (1.0, 0.1, 0.01)]
    ratios = [step / steps[0] for step in steps]
    print(f"{name}: steps at density 1, 0.1, 0.01 in parts of the dense one:", [round(ratio, 2) for ratio in ratios])
    if name in grow:
        assert 2.5 < ratios[1] < 4 and 8 < ratios[2] < 14, "this has changed"
    else:
        assert all(0.8 < ratio < 1.2 for ratio in ratios), "this has changed"
print("as described")
PY
