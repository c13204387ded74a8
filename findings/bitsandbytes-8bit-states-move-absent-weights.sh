#!/usr/bin/env bash
# Guess:    a weight that is zero and whose gradient is zero in every step, as a masked one's, stays zero under the 8-bit optimizers
#           of bitsandbytes, as under their 32-bit twins: zero is among the 256 values that their states are stored in.
# Happens:  on a CPU zero is not stored as zero but as a value a little above it, in proportion to the largest state of its block of
#           256, so that every absent weight has a momentum. Adam8bit moves all of them, slowly; Lion8bit, for which only the sign
#           counts, moves them by the full learning rate in every step but the first, as much as any weight that is trained.
#           Nothing is said. quantize_blockwise itself turns all zeros of a pruned weight into such a value. Multiplying
#           the weight by its mask after each step keeps the zeros.
# Seen with bitsandbytes 0.50.2, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.15.0' 'bitsandbytes==0.50.2' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import bitsandbytes
import torch
from bitsandbytes import functional
from torch import nn

torch.manual_seed(0)
mask = torch.rand(128, 128) < 0.1
start = torch.randn(128, 128) * mask
x, target = torch.randn(64, 128), torch.randn(64, 128)
steps, rate = 5, 0.01


def absent_weights(name):
    weight = nn.Parameter(start.clone())
    optimizer = getattr(bitsandbytes.optim, name)([weight], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        ((x @ (weight * mask).T - target) ** 2).mean().backward()
        assert not weight.grad[~mask].any()
        optimizer.step()
    return weight.detach()[~mask]


print("bitsandbytes", version("bitsandbytes"), "zero among the values:", 0 in functional.create_dynamic_map())
seen = {}
for name in ("Adam", "Adam8bit", "Lion", "Lion8bit"):
    absent = absent_weights(name)
    seen[name] = round(float((absent != 0).float().mean()), 2), float(absent.abs().max())
    print(f"{name}: of the absent weights {seen[name][0]:.0%} are not zero after {steps} steps, the largest is {seen[name][1]:.2g}")
stored, state = functional.quantize_blockwise(start)
zeros = functional.dequantize_blockwise(stored, state)[~mask]
print(f"quantize_blockwise: of the zeros {float((zeros != 0).float().mean()):.0%} come back as something else")
assert seen["Adam"] == seen["Lion"] == (0, 0), "this has changed"
assert seen["Adam8bit"][0] > 0.9 and seen["Lion8bit"][0] > 0.9, "this has changed"
assert abs(seen["Lion8bit"][1] - (steps - 1) * rate) < 1e-3, "this has changed"
assert zeros.all(), "this has changed"
print("as described")
PY
