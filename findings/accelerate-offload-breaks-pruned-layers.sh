#!/usr/bin/env bash
# Guess:    accelerate's cpu_offload and disk_offload run a model under torch.nn.utils.prune as any other: its parameters and buffers,
#           masks among them, are fetched for the layer's forward, and the pruned weight is computed from them there.
# Happens:  the hook that multiplies weight_orig and weight_mask runs before accelerate has fetched them, on placeholders without
#           values, and the forward raises a RuntimeError about a tensor on device meta.
#           Where the mask is a parametrization, and after prune.remove, the offloaded model computes what it did.
# Seen with accelerate 1.15.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.15.0' 'accelerate==1.15.0' 'numpy==2.4.6'
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import tempfile

import accelerate
import torch
from torch import nn
from torch.nn.utils import parametrize, prune


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def masked(layer):
    parametrize.register_parametrization(layer, "weight", Masked((torch.rand_like(layer.weight) < 0.3).float()))


def removed(layer):
    prune.l1_unstructured(layer, "weight", 0.7)
    prune.remove(layer, "weight")


changes = {
    "plain": lambda layer: None,
    "nn.utils.prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.7),
    "mask as a parametrization": masked,
    "prune.remove": removed,
}
offloads = {
    "cpu_offload": lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model: accelerate.disk_offload(model, tempfile.mkdtemp(dir="."), execution_device="cpu"),
}


@torch.no_grad()
def outcome(change, offload):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    change(model[0])
    x = torch.randn(3, 16)
    before = model(x)
    offload(model)
    try:
        return "right" if torch.allclose(model(x), before) else "wrong"
    except RuntimeError as error:
        return f"RuntimeError: {error}"


print("accelerate", accelerate.__version__)
seen = {(name, way): outcome(change, offload) for name, change in changes.items() for way, offload in offloads.items()}
for (name, way), found in seen.items():
    print(f"{name}, {way}: {found}")
    breaks = name == "nn.utils.prune"
    assert (found.startswith("RuntimeError") and "meta" in found) if breaks else found == "right", "this has changed"
print("as described")
PY
