#!/usr/bin/env bash
# Guess:    calflops counts `x @ w` as it counts F.linear(x, w) and torch.matmul(x, w); a model it has counted before, and one
#           that it could not count, leave no trace in what it says of the next.
# Happens:  the operator @ counts as nothing: an attention that is written with it, as most are, shows its projections only, and
#           so does a layer that multiplies by its weight. torch.matmul and x.matmul(w) count; torch.bmm, torch.tensordot and
#           F.linear imported by name do not. A grouped transposed convolution is divided by its groups once too often. Where
#           counting a model raises, here one without parameters, every model counted after that in the process has twice its
#           FLOPs. Nothing is said.
# Seen with calflops 0.3.2, transformers 5.24.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'calflops==0.3.2' 'transformers==5.24.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import contextlib
import io
from importlib.metadata import version

import torch
import torch.nn.functional as F
from calflops import calculate_flops
from torch import nn
from torch.nn.functional import linear as imported
from torch.utils.flop_counter import FlopCounterMode


class Layer(nn.Module):
    def __init__(self, compute, *shape):
        super().__init__()
        self.weight, self.compute = nn.Parameter(torch.ones(shape)), compute

    def forward(self, x):
        return self.compute(x, self.weight)


def count(net, x):
    with contextlib.redirect_stdout(io.StringIO()):
        return calculate_flops(net, args=[x], print_results=False, print_detailed=False, output_as_string=False)[0]


def count_by_torch(net, x):
    with FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops()


def linear(x, w):
    return F.linear(x, w)


print("calflops", version("calflops"), "torch", torch.__version__)
x, image = torch.ones(8, 64), torch.ones(2, 8, 16, 16)
seen = {}
for name, (net, given) in {
    "F.linear": (Layer(linear, 64, 64), x),
    "linear, imported by name": (Layer(lambda x, w: imported(x, w), 64, 64), x),
    "torch.matmul": (Layer(lambda x, w: torch.matmul(x, w), 64, 64), x),
    "x @ w": (Layer(lambda x, w: x @ w, 64, 64), x),
    "x.matmul(w)": (Layer(lambda x, w: x.matmul(w), 64, 64), x),
    "torch.bmm": (Layer(lambda x, w: torch.bmm(x[None], w[None]), 64, 64), x),
    "torch.tensordot": (Layer(lambda x, w: torch.tensordot(x, w, 1), 64, 64), x),
    "transposed convolution": (nn.ConvTranspose2d(8, 16, 2, 2, bias=False), image),
    "transposed convolution in 4 groups": (nn.ConvTranspose2d(8, 16, 2, 2, groups=4, bias=False), image),
}.items():
    seen[name] = count(net, given), count_by_torch(net, given)
    print(f"{name}: {seen[name][0]} FLOPs, by torch's counter {seen[name][1]}")
for name in ("F.linear", "torch.matmul", "x.matmul(w)", "transposed convolution"):
    assert seen[name][0] == seen[name][1], "this has changed"
for name in ("x @ w", "linear, imported by name", "torch.bmm", "torch.tensordot"):
    assert seen[name][0] == 0 < seen[name][1], "this has changed"
assert seen["transposed convolution in 4 groups"][0] * 4 == seen["transposed convolution in 4 groups"][1], (
    "this has changed"
)
for failures in (1, 2):
    try:
        count(nn.Flatten(), image)
    except Exception as error:  # whichever class it is
        print("a model without parameters raises", type(error).__name__)
    else:
        raise AssertionError("this has changed")
    after = count(Layer(linear, 64, 64), x)
    print(f"F.linear after {failures} of them: {after}, torch's counter {count_by_torch(Layer(linear, 64, 64), x)}")
    assert after == (failures + 1) * seen["F.linear"][0], "this has changed"
print("as described")
PY
