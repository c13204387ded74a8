#!/usr/bin/env bash
# Guess:    torch.nn.utils.prune on the out_proj of an nn.MultiheadAttention, a linear layer, works as on any other: each forward
#           computes the weight from weight_orig and weight_mask, so that a loaded state dict and training take effect. In train
#           mode and with gradients, where no fused operator is used, at least.
# Happens:  the attention reads out_proj.weight and never calls out_proj, so the hook that computes the weight does not run. What
#           was computed when the layer was pruned stays: after load_state_dict, and after a mask of zeros, the output is the same
#           as before, without a word, until prune.remove switches to the loaded weight. In training the first step works and
#           moves weight_orig but not the projection in use, and the second backward raises a RuntimeError, as the graph of the one
#           product is used up.
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
from torch.nn.utils import prune

warnings.simplefilter("error")  # a warning would end the script


def attention(seed):
    torch.manual_seed(seed)
    model = nn.MultiheadAttention(16, 2)
    prune.l1_unstructured(model.out_proj, "weight", 0.5)
    return model.train()


def change(model, edit):
    """How much the output of the model in train mode changes with `edit`."""
    before = model(x, x, x)[0].detach()
    edit(model)
    return float((model(x, x, x)[0].detach() - before).abs().max())


torch.manual_seed(0)
x = torch.randn(5, 3, 16)
projection = {name: value for name, value in attention(1).state_dict().items() if name.startswith("out_proj.weight")}
nothing = {"out_proj.weight_mask": torch.zeros(16, 16)}
model = attention(0)
seen = {
    "another projection is loaded": change(model, lambda model: model.load_state_dict(projection, strict=False)),
    "a mask of zeros is loaded": change(model, lambda model: model.load_state_dict(nothing, strict=False)),
    "prune.remove, which should change nothing": change(model, lambda model: prune.remove(model.out_proj, "weight")),
}
print("torch", torch.__version__, *(f"\n{name}: the output changes by {value:.3f}" for name, value in seen.items()))
assert list(seen.values())[:2] == [0, 0] and list(seen.values())[2] > 0.01, "this has changed"

model = attention(0)
optimizer = torch.optim.SGD(model.out_proj.parameters(), 0.1)


def step(model):
    model(x, x, x)[0].square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


stored = model.out_proj.weight_orig.detach().clone()
moved = change(model, step), float((model.out_proj.weight_orig.detach() - stored).abs().max())
try:
    step(model)
    second = "works"
except RuntimeError as error:
    second = str(error)[:54]
print(f"a step of SGD on the projection: weight_orig moves by {moved[1]:.3f}; second step: {second}")
print(f"the output moves by {moved[0]:.3f}, which is what the bias does")
bias_only = attention(0)
with torch.no_grad():
    moves = change(bias_only, lambda bias_only: bias_only.out_proj.bias.copy_(model.out_proj.bias))
assert moved[1] > 0.01 and abs(moves - moved[0]) < 1e-6, "this has changed"
assert "backward through the graph a second time" in second, "this has changed"
print("as described")
PY
