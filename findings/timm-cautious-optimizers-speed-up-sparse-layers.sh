#!/usr/bin/env bash
# Guess:    timm's cautious optimizers ("cadamw", "clion", "csgdw" and others), which leave out the part of a step that points
#           against the gradient, move the weights of a pruned layer, gradients and weights zero where an edge is absent, as they
#           move those of a dense one, and at most about twice as far as their plain twins: what they leave out they make up for on
#           the rest.
# Happens:  the rest is scaled by one over the share of weights whose step agrees with the gradient, and an absent weight, whose
#           step and gradient are zero, counts as one that does not agree. At a density of 10 % every step is ten times as large,
#           at 1 % a hundred times: the learning rate grows as the network gets sparser, layer by layer, without a word. The plain
#           twins take the same step at every density. Absent weights stay zero.
# Seen with timm 1.0.31, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'timm==1.0.31' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn


def step_length(name, density):
    """Mean distance that a kept weight goes in one of ten steps, and whether absent weights are zero."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(128, 128, generator=generator) < density).float()
    weight = nn.Parameter(torch.randn(128, 128, generator=generator) * mask)
    optimizer = create_optimizer_v2([weight], opt=name, lr=1e-3, weight_decay=0.0)
    lengths = []
    for _ in range(10):
        before = weight.detach().clone()
        weight.grad = torch.randn(128, 128, generator=generator) * mask
        optimizer.step()
        lengths.append(float((weight.detach() - before)[mask > 0].abs().mean()))
    assert not weight.detach()[mask == 0].any(), "this has changed"
    return sum(lengths) / len(lengths)


print("timm", timm.__version__, "torch", torch.__version__)
for plain in ("adamw", "lion", "sgdw", "nadamw", "laprop"):
    seen = {}
    for name in (plain, "c" + plain):
        seen[name] = [step_length(name, density) for density in (1.0, 0.1, 0.01)]
        print(f"{name}: mean step at density 1, 0.1, 0.01:", ", ".join(f"{length:.1e}" for length in seen[name]))
    usual = [length / seen[plain][0] for length in seen[plain]]
    cautious = [length / seen["c" + plain][0] for length in seen["c" + plain]]
    assert 0.7 < usual[1] < 1.4 and 0.7 < usual[2] < 1.4, "this has changed"
    assert 7 < cautious[1] < 14 and 70 < cautious[2] < 140, "this has changed"
print("as described")
PY
