#!/usr/bin/env bash
# Guess:    a forward hook on `linear1` of an nn.TransformerEncoderLayer fires in every forward.
# Happens:  in evaluation without gradients the layer hands its weights to one fused operator and calls none of its
#           submodules, so hooks on them do not fire; with gradients, or in train mode, they do.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import nn

calls = []
layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
layer.linear1.register_forward_hook(lambda *_: calls.append(1))
x = torch.randn(2, 3, 8)
seen = {}
for mode, gradients in (("train", True), ("eval", True), ("eval", False)):
    layer.train(mode == "train")
    calls.clear()
    with torch.set_grad_enabled(gradients):
        layer(x)
    seen[mode, gradients] = len(calls)
print("calls of the hook by (mode, gradients):", seen)
assert seen == {("train", True): 1, ("eval", True): 1, ("eval", False): 0}, "this has changed"
print("as described")
PY
