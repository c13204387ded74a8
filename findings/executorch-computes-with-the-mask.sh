#!/usr/bin/env bash
# Guess:    a linear layer pruned by torch.nn.utils.prune (weight = weight_mask * weight_orig, not made permanent) and lowered to
#           ExecuTorch's XNNPACK backend computes what it computed in torch, or is left to the portable operators.
# Happens:  the backend takes the layer as a whole and drops the product in it: the program computes with the mask itself, that is
#           with a weight of ones and zeros. torch.export warns that the layer assigns its weight, as it does where all goes well;
#           at lowering, loading and running nothing is said. The portable operators give torch's answer. So does XNNPACK where the
#           product is not part of the nn.Linear (a parametrization that masks), for a convolution, and after prune.remove.
# Seen with executorch 1.5.1, torchao 0.18.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'executorch==1.5.1' 'torchao==0.18.0' 'numpy==2.4.6'
cd "$folder"
"$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { cat "$folder/log"; exit 1; }
from importlib.metadata import version

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import nn
from torch.nn.utils import parametrize, prune


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return self.mask * weight


@torch.no_grad()
def lowered(model, x, partitioner):
    program = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=partitioner).to_executorch()
    return Runtime.get().load_program(bytes(program.buffer)).load_method("forward").execute([x])[0].clone()


def pruned(layer):
    model = nn.Sequential(layer).eval()
    prune.l1_unstructured(layer, "weight", 0.9)
    return model


@torch.no_grad()
def from_torch(model, x, partitioner):
    return float((lowered(model, x, partitioner) - model(x)).abs().max())


torch.manual_seed(0)
x = torch.randn(8, 16)
model = pruned(nn.Linear(16, 32))
layer = model[0]
with torch.no_grad():
    with_mask = nn.functional.linear(x, layer.weight_mask, layer.bias)
    from_mask = float((lowered(model, x, [XnnpackPartitioner()]) - with_mask).abs().max())
wrong = from_torch(model, x, [XnnpackPartitioner()])
print("executorch", version("executorch"), "torch", torch.__version__)
print(f"a pruned linear layer, XNNPACK: distance from torch {wrong:.3f}, from the mask as weight {from_mask:.0e}")
parametrized = nn.Sequential(nn.Linear(16, 32)).eval()
parametrize.register_parametrization(parametrized[0], "weight", Mask(layer.weight_mask.clone()))
right = {
    "the same, portable operators": from_torch(model, x, []),
    "a mask as parametrization, XNNPACK": from_torch(parametrized, x, [XnnpackPartitioner()]),
    "a pruned convolution, XNNPACK": from_torch(
        pruned(nn.Conv2d(3, 8, 3)), torch.randn(1, 3, 8, 8), [XnnpackPartitioner()]
    ),
}
prune.remove(layer, "weight")
right["the linear layer after prune.remove, XNNPACK"] = from_torch(model, x, [XnnpackPartitioner()])
for name, distance in right.items():
    print(f"{name}: distance from torch {distance:.0e}")
assert wrong > 1 and from_mask < 1e-5, "this has changed"
assert max(right.values()) < 1e-4, "this has changed"
print("as described")
PY
