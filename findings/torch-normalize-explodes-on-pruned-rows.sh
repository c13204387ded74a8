#!/usr/bin/env bash
# Guess:    F.normalize of a weight, as in a cosine classifier, guards its division by an eps, so that a row of zeros, a pruned unit,
#           gives zeros and has a gradient of about the size of the others'.
# Happens:  the output is zero, and the gradient is divided by the eps, 1e-12: it is a million million times that of the other rows.
#           clip_grad_norm_ then scales all gradients by that and nothing else trains, without a word; growth by the largest gradient
#           of absent edges, as in RigL, takes those of the empty row alone. F.cosine_similarity does it with 1e-8.
#           A mask that is part of the forward, as of nn.utils.prune, hides it from the optimizer, not from the growth.
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
from torch.nn import functional

warnings.simplefilter("error")  # a warning would end the script
torch.manual_seed(0)
x, y = torch.randn(64, 16), torch.randint(6, (64,))
mask = torch.rand(6, 16) < 0.5
mask[2] = False  # nothing is left of this class
classifiers = {
    "F.normalize": lambda weight, features: functional.linear(functional.normalize(features), functional.normalize(weight)),
    "F.cosine_similarity": lambda weight, features: functional.cosine_similarity(features[:, None], weight, dim=-1),
    "plain": lambda weight, features: functional.linear(features, weight),
}


def facts(classify):
    torch.manual_seed(1)
    body, weight = nn.Linear(16, 16), nn.Parameter(torch.randn(6, 16) * mask)
    loss = functional.cross_entropy(10 * classify(weight, body(x)), y)
    loss.backward()
    rows = weight.grad.norm(dim=1)
    absent = torch.where(mask, 0, weight.grad.abs()).flatten()
    grown = absent.topk(12).indices // 16
    nn.utils.clip_grad_norm_([*body.parameters(), weight], 1.0)
    return float(loss.detach()), float(rows[2] / rows[mask.any(1)].mean()), set(grown.tolist()), float(body.weight.grad.norm())


print("torch", torch.__version__, "row 2 of 6 is zero")
seen = {}
for name, classify in classifiers.items():
    loss, ratio, grown, left = seen[name] = facts(classify)
    print(f"{name}: loss {loss:.2f}; the gradient of row 2 is {ratio:.1e} times that of the others", end="; ")
    print(f"rows that growth takes {sorted(grown)}; gradient left of the layer before, clipped to 1: {left:.1e}")
assert seen["F.normalize"][1] > 1e11 and seen["F.cosine_similarity"][1] > 1e7, "this has changed"
for name in ("F.normalize", "F.cosine_similarity"):
    assert seen[name][2] == {2} and seen[name][3] < 1e-6, "this has changed"
assert seen["plain"][1] < 10 and len(seen["plain"][2]) > 1 and seen["plain"][3] > 1e-2, "this has changed"
print("as described")
PY
