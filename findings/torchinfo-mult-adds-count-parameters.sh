#!/usr/bin/env bash
# Guess:    total_mult_adds of torchinfo's summary is about half of the FLOPs that torch's own counter finds, for a transformer
#           layer as for a plain network; or a layer it cannot count is named.
# Happens:  it multiplies the parameters of modules without children by their output positions. An nn.MultiheadAttention counts
#           as nothing, its projections too: a transformer layer shows a tenth of what it computes. A linear layer under
#           weight_norm and F.linear count as nothing, and a transposed convolution of stride 2 counts four times too much. A
#           layer under torch.nn.utils.prune counts by the ones of its mask, though it computes densely; the same zeros after
#           prune.remove count in full. Nothing is said in any of these cases.
# Seen with torchinfo 1.8.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torchinfo==1.8.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import torch
import torchinfo
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 32))
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        return self.last(F.linear(x, self.weight))


def masked():
    layer = nn.Linear(32, 64, bias=False)
    prune.l1_unstructured(layer, "weight", 0.9)
    return layer


def removed():
    layer = masked()
    prune.remove(layer, "weight")
    return layer


rows, image = torch.randn(1, 32), torch.randn(1, 8, 8, 8)
cases = {
    "linear": (nn.Linear(32, 64, bias=False), rows),
    "linear and F.linear": (Functional(), rows),
    "linear with weight_norm": (parametrizations.weight_norm(nn.Linear(32, 64)), rows),
    "transposed convolution": (nn.ConvTranspose2d(8, 4, 2, stride=2, bias=False), image),
    "transformer layer": (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), torch.randn(1, 5, 32)),
    "linear, 10 % kept by a mask": (masked(), rows),
    "linear, the mask made permanent": (removed(), rows),
}
seen = {}
for name, (model, x) in cases.items():
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(x)
    told = torchinfo.summary(model, input_data=x, verbose=0, mode="train").total_mult_adds
    seen[name] = told / (counter.get_total_flops() / 2)
    print(f"{name}: torchinfo {told}, torch {counter.get_total_flops() // 2}, ratio {seen[name]:.2f}")
assert seen["linear"] == seen["linear, the mask made permanent"] == 1, "this has changed"
assert seen["linear and F.linear"] < 0.2 and seen["linear with weight_norm"] == 0, "this has changed"
assert seen["transposed convolution"] == 4 and seen["transformer layer"] < 0.15, "this has changed"
assert 0.05 < seen["linear, 10 % kept by a mask"] < 0.15, "this has changed"
print("as described")
PY
