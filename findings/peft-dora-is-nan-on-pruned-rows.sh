#!/usr/bin/env bash
# Guess:    LoRA with use_dora=True on a layer of which some outputs are pruned, their rows of the weight zero, begins as the layer
#           itself, as LoRA without it does: an eps guards the division by a row's norm.
# Happens:  the norm of a row of zeros divides itself, and each pruned output is NaN from the first forward on, without a word; the
#           next layer, which reads all outputs, makes everything NaN. Training cannot mend it. torch's weight_norm makes NaN of such
#           a row as well, as soon as it is applied, and spectral_norm of a weight that is all zeros.
# Seen with peft 0.21.2, transformers 5.24.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.15.0' 'transformers==5.24.0' 'peft==0.21.2' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.first(x).relu())


def pruned():
    """A quarter of the hidden units cut off, weights and biases, and the pruning made permanent."""
    model = Network()
    prune.ln_structured(model.first, "weight", 0.25, n=2, dim=0)
    model.first.bias.data[model.first.weight_mask[:, 0] == 0] = 0
    prune.remove(model.first, "weight")
    return model


torch.manual_seed(1)
x, y = torch.randn(32, 16), torch.randint(4, (32,))
plain = pruned()
seen = {}
for dora in (False, True):
    model = get_peft_model(pruned(), LoraConfig(r=2, target_modules=["first"], use_dora=dora))
    begins_as_layer = torch.allclose(model(x), plain(x), atol=1e-6)
    first = int(model.base_model.model.first(x).isnan().any(0).sum())
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    seen[dora] = begins_as_layer, first, round(float(model(x).isnan().float().mean()), 2)
    print(f"use_dora={dora}: begins as the layer {begins_as_layer}, {first} of 12 hidden units are NaN", end=" ")
    print(f"and after training {seen[dora][2]:.0%} of the outputs")

normed = parametrizations.weight_norm(pruned().first)
empty = nn.Linear(16, 12)
nn.init.zeros_(empty.weight)
rows = int(normed.weight.isnan().any(1).sum())
spectral = bool(parametrizations.spectral_norm(empty).weight.isnan().all())
print("weight_norm: rows of NaN", rows, "of 12; spectral_norm of zeros is NaN:", spectral)
assert seen == {False: (True, 0, 0), True: (False, 3, 1)} and (rows, spectral) == (3, True), "this has changed"
print("as described")
PY
