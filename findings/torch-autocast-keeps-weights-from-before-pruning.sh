#!/usr/bin/env bash
# Guess:    under autocast each forward computes with the weights as they are: pruned in place between two forwards of one
#           autocast region, a network is evaluated as pruned. Casts that autocast keeps are checked by the weight's version
#           counter.
# Happens:  autocast keeps the cast of a weight until its region ends and does not look whether the weight has changed. A
#           network pruned to 90 %, or set to zero altogether, gives bit for bit the outputs of the dense one; a search for the
#           best sparsity in one region finds that all cost nothing. Optimizer steps and load_state_dict in a region are not
#           seen either. no_grad does not help, as the parameter still asks for gradients; nothing is said. It is right in
#           inference_mode, with cache_enabled=False, in a region for each forward, and where a mask is part of the forward.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import contextlib
import copy
import warnings

import torch
from torch import nn
from torch.nn.utils import prune

warnings.simplefilter("error")  # a warning would end the script
torch.manual_seed(0)
dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
inputs = torch.randn(32, 64)


def cut(net):
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.mul_(layer.weight.abs() > layer.weight.abs().quantile(0.9))


def step(net):
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(net.parameters(), lr=1.0).step()


def change(change_net, grad=torch.no_grad, **options):
    """Largest change of the output that a change of the weights makes within one autocast region."""
    net = copy.deepcopy(dense)
    with torch.autocast("cpu", torch.bfloat16, **options):
        with grad():
            before = net(inputs)
        change_net(net)
        with grad():
            return float((net(inputs) - before).detach().abs().max())


zeros = {name: torch.zeros_like(value) for name, value in dense.state_dict().items()}
print("torch", torch.__version__)
for name, act in {
    "pruned to 90 %": cut,
    "one step of SGD": step,
    "zeros loaded": lambda net: net.load_state_dict(zeros),
}.items():
    seen = {
        "no_grad": change(act),
        "with gradients": change(act, contextlib.nullcontext),
        "inference_mode": change(act, torch.inference_mode),
        "cache_enabled=False": change(act, cache_enabled=False),
    }
    print(f"{name}: change of the output {seen}")
    assert seen["no_grad"] == seen["with gradients"] == 0, "this has changed"
    assert seen["inference_mode"] > 0.1 and seen["cache_enabled=False"] > 0.1, "this has changed"


def mask(net):
    prune.l1_unstructured(net[0], "weight", 0.9)


print("mask in the forward, torch.nn.utils.prune:", masked := change(mask))
assert masked > 0.1, "this has changed"
print("as described")
PY
