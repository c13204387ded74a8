#!/usr/bin/env bash
# Guess:    Torch-Pruning cuts a network with an nn.MultiheadAttention to pruning_ratio=0.5, and num_heads, its option for the heads
#           of attention, only makes it keep to whole heads or to heads of one size.
# Happens:  with num_heads the attention and every layer that adds to or reads the same stream stay whole, without a word, and
#           so they do with prune_num_heads and a head_pruning_ratio; only the feed-forward layer inside is cut. Without it
#           they are cut, but across heads: where all that is removed are two of the four heads, both all zeros, four heads of
#           half the size are left, and the output changes.
# Seen with torch-pruning 1.6.1, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torch-pruning==1.6.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import torch
import torch_pruning
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.inner = nn.Linear(32, 64)
        self.outer = nn.Linear(64, 32)
        self.last = nn.Linear(32, 3)

    def forward(self, x):
        x = self.first(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.outer(self.inner(x).relu())
        return self.last(x)


def cut(model, **options):
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        torch.randn(1, 5, 8),
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model.last],
        **options,
    )
    pruner.step()
    attention = model.attention
    return model.first.out_features, attention.embed_dim, attention.num_heads, model.inner.out_features


seen = {}
for name in ("no num_heads", "num_heads", "num_heads, prune_num_heads"):
    torch.manual_seed(0)
    model = Encoder()
    options = {} if name == "no num_heads" else {"num_heads": {model.attention: 4}}
    if "prune" in name:
        options |= {"prune_num_heads": True, "head_pruning_ratio": 0.5}
    seen[name] = cut(model, **options)
    print(f"{name}: first layer, attention, heads and inner layer {seen[name]}")
assert seen["no num_heads"] == (16, 16, 4, 32), "this has changed"
assert seen["num_heads"] == seen["num_heads, prune_num_heads"] == (32, 32, 4, 32), "this has changed"

torch.manual_seed(0)
model = Encoder().eval()
with torch.no_grad():  # the first two heads and their half of the stream hold nothing but zeros
    for weight in (model.first.weight, model.first.bias, model.outer.weight, model.outer.bias):
        weight[:16] = 0
    for part in range(3):
        model.attention.in_proj_weight[32 * part : 32 * part + 16] = 0
    model.attention.in_proj_weight[:, :16] = 0
    model.attention.in_proj_weight *= 4
    model.attention.out_proj.weight[:16] = model.attention.out_proj.weight[:, :16] = 0
    model.inner.weight[:, :16] = model.last.weight[:, :16] = 0
x = torch.randn(2, 5, 8)
before = model(x).detach()
cut(model, pruning_ratio_dict={model.inner: 0.0})
after = model(x).detach()
print("heads of zeros cut off: size", model.attention.embed_dim, "largest change", float((after - before).abs().max()))
assert model.attention.embed_dim == 16 and model.attention.head_dim == 4, "this has changed"
assert (after - before).abs().max() > 1e-2, "this has changed"
print("as described")
PY
