#!/usr/bin/env bash
# Guess:    reset_parameters() of a layer under torch.nn.utils.prune draws new weights and leaves the mask alone: the way to compare
#           a ticket with the same pattern from another initialisation.
# Happens:  only the bias is new. The weight is drawn into `weight`, the product of weight_orig and weight_mask that the next forward
#           computes anew, so that the layer goes on with its old weights and nothing is said; until that forward `weight` shows
#           the new ones, without the mask. nn.init on layer.weight is lost in the same way. Where the mask is a parametrization
#           they are written to a tensor that nobody keeps, and `weight` shows the old ones at once. nn.init on weight_orig works.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

warnings.simplefilter("error")  # a warning would end the script
torch.manual_seed(0)
x = torch.randn(4, 32)


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def pruned():
    layer = nn.Linear(32, 16)
    prune.l1_unstructured(layer, "weight", 0.8)
    return layer


def parametrized():
    layer = nn.Linear(32, 16)
    return parametrize.register_parametrization(layer, "weight", Masked((torch.rand(16, 32) < 0.2).float()))


def facts(layer, draw):
    """Whether the weight that is shown, the one computed with, and the bias differ after `draw`; the density shown meanwhile."""
    layer(x)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    draw(layer)
    shown = layer.weight.detach().clone()
    layer(x)
    used = layer.weight.detach()
    changed = [not torch.equal(one, other) for one, other in ((shown, weight), (used, weight), (layer.bias, bias))]
    return *changed, round(float((shown != 0).float().mean()), 1)


seen = {
    "nn.utils.prune, reset_parameters": facts(pruned(), nn.Linear.reset_parameters),
    "nn.utils.prune, nn.init on weight": facts(pruned(), lambda layer: nn.init.normal_(layer.weight)),
    "nn.utils.prune, nn.init on weight_orig": facts(pruned(), lambda layer: nn.init.normal_(layer.weight_orig)),
    "parametrization, reset_parameters": facts(parametrized(), nn.Linear.reset_parameters),
}
print("torch", torch.__version__)
for name, (shown, used, bias, density) in seen.items():
    print(f"{name}: weight shown new {shown}, weight used new {used}, bias new {bias}; density shown {density}")
assert list(seen.values()) == [
    (True, False, True, 1.0),
    (True, False, False, 1.0),
    (False, True, False, 0.2),
    (False, False, True, 0.2),
], "this has changed"
print("as described")
PY
