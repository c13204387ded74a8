#!/usr/bin/env bash
# Guess:    a layer whose weight has a parametrization (a mask by torch.nn.utils.parametrize, or parametrizations.weight_norm) has as
#           many multiplications in thop and ptflops as it had before, as it has under torch.nn.utils.prune: it is the same layer.
# Happens:  a parametrization gives the layer a class of its own, and both look layers up by class: thop counts nothing and no parameters
#           for it, ptflops by its default backend counts the activations alone. A network of which some layers are masked shows
#           the others' cost as its own, as if the masked ones had been cut off. Nothing is said. ptflops with backend="aten",
#           fvcore and calflops count the same as before.
# Seen with thop 0.1.1.post2209072238, ptflops 0.7.5, fvcore 0.1.5.post20221221, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.15.0' 'torchvision==0.29.2' 'thop==0.1.1.post2209072238' 'ptflops==0.7.5' \
    'fvcore==0.1.5.post20221221' 'numpy==2.4.6' setuptools
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging

import thop
import torch
from fvcore.nn import FlopCountAnalysis
from ptflops import get_model_complexity_info
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

logging.getLogger("fvcore").setLevel(logging.ERROR)


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def mask(layer):
    parametrize.register_parametrization(layer, "weight", Masked((torch.rand_like(layer.weight) < 0.1).float()))


changes = {
    "plain": lambda layer: None,
    "nn.utils.prune": lambda layer: prune.random_unstructured(layer, "weight", 0.9),
    "mask as a parametrization": mask,
    "weight_norm": parametrizations.weight_norm,
}


def network(change):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 10)
    ).eval()
    for index in (2, 4):
        change(model[index])
    return model


def by_ptflops(change, backend):
    return get_model_complexity_info(network(change), (3, 8, 8), False, False, backend=backend)[0]


x = torch.randn(1, 3, 8, 8)
counters = {
    "thop": lambda change: int(thop.profile(network(change), (x,), verbose=False)[0]),
    "ptflops": lambda change: by_ptflops(change, "pytorch"),
    "ptflops, aten": lambda change: by_ptflops(change, "aten"),
    "fvcore": lambda change: FlopCountAnalysis(network(change), x).total(),
}
products = {"first": 3 * 8 * 9 * 64, "all": 3 * 8 * 9 * 64 + 8 * 8 * 9 * 64 + 512 * 10}
print("products of the network:", products)
for name, count in counters.items():
    seen = [count(change) for change in changes.values()]
    print(f"{name}:", dict(zip(changes, seen, strict=True)))
    assert abs(seen[0] / products["all"] - 1) < 0.05 and seen[1] == seen[0], "this has changed"
    if name in ("thop", "ptflops"):
        assert all(abs(found / products["first"] - 1) < 0.15 for found in seen[2:]), "this has changed"
    else:
        assert all(abs(found / seen[0] - 1) < 0.05 for found in seen[2:]), "this has changed"
print("as described")
PY
