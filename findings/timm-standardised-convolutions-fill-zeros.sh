#!/usr/bin/env bash
# Guess:    a zero in the weight of a timm convolution, put there by torch.nn.utils.prune, is an absent edge in BiT and nf_resnet as
#           in resnet: what it would have read does not reach the output.
# Happens:  StdConv2d and ScaledStdConv2d, the convolutions of those networks, subtract each filter's mean from the weight before
#           they use it, zeros included. Pruned to a tenth, they compute with a full weight: an input channel whose edges are all
#           pruned still moves the output, in one convolution and in the whole network, and nothing that skips zeros (a sparse
#           kernel, a cut channel) gives the layer's result. Only filters of which nothing is left compute zeros.
# Seen with timm 1.0.31, torch 2.15.0, torchvision 0.29.2 and numpy 2.4.6, CPU, Python 3.11: the mask has to come after the mean.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torchvision==0.29.2' 'timm==1.0.31' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import timm
import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import prune


@torch.no_grad()
def layer_facts(kind):
    """Densities of the weight as stored and as used, and how far a pruned channel moves the output."""
    torch.manual_seed(0)
    layer = kind(8, 16, 3, padding=1, bias=False)
    mask = (torch.rand(layer.weight.shape) < 0.1).float()
    mask[:, 0] = 0  # nothing reads channel 0
    mask[0] = 0  # nothing is left of filter 0
    prune.custom_from_mask(layer, "weight", mask)
    x = torch.randn(1, 8, 9, 9)
    moved = x.clone()
    moved[:, 0] += 1
    impulses = torch.zeros(72, 8, 3, 3)
    impulses.view(72, 72).fill_diagonal_(1)
    used = layer(impulses)[:, 1:, 1, 1]  # the output at the middle, for each edge of each filter but the first
    return (
        round(float((layer.weight[1:] != 0).float().mean()), 2),
        round(float((used.abs() > 1e-6).float().mean()), 2),
        float((layer(moved) - layer(x)).abs().max()),
        float(layer(x)[:, 0].abs().max()),
    )


@torch.no_grad()
def network_moves(name):
    """Whether the network's output moves with a colour channel that its first convolution does not read."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    prune.l1_unstructured(first, "weight", 0.5)
    first.weight_mask[:, 0] = 0
    x = torch.randn(1, 3, 64, 64)
    moved = x.clone()
    moved[:, 0] += torch.randn(64, 64)
    return float((model(moved) - model(x)).abs().max()) > 1e-4


print("timm", timm.__version__)
seen = {kind.__name__: layer_facts(kind) for kind in (nn.Conv2d, StdConv2d, ScaledStdConv2d)}
for name, (stored, used, moves, empty) in seen.items():
    print(f"{name}: density stored {stored}, used {used}; a pruned channel moves the output by {moves:.3f}; empty filter {empty}")
    plain = name == "Conv2d"
    assert (used == stored and moves == 0) if plain else (used == 1 and moves > 0.1), "this has changed"
    assert empty == 0, "this has changed"
networks = {name: network_moves(name) for name in ("resnet10t", "resnetv2_50x1_bit", "nf_resnet26")}
print("an unread colour moves the output:", networks)
assert list(networks.values()) == [False, True, True], "this has changed"
print("as described")
PY
