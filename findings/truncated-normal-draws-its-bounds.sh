#!/usr/bin/env bash
# Guess:    a truncated normal distribution, as vision models start from, has no values that a normal one of the same spread would
#           not have, whatever the weight's precision: timm's trunc_normal_(std=0.02) in bfloat16 gives weights of at most 0.12 or
#           so.
# Happens:  timm's draws a uniform number from -1 to 1 in the weight's own type and takes its inverse error function. Rounded to
#           bfloat16 it is an end of that range now and then, the result infinite, and cut to the default bounds of 2 on both
#           sides: one weight in 500 is -2 or 2, a hundred times the spread, and the weight's standard deviation 0.09 instead of
#           0.02. In float16 it is one in 5,000. A pruning by size keeps these first. torch's nn.init.trunc_normal_ is right, and
#           so is timm's trunc_normal_tf_. jax.random.truncated_normal does it at its lower bound alone: with bounds of 10 standard
#           deviations one number in 130 is near -10, and their mean is below zero.
# Seen with timm 1.0.31, torch 2.15.0, jax 0.10.2 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'timm==1.0.31' 'jax==0.10.2' 'numpy==2.4.6'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
import timm
import torch
from timm.layers import trunc_normal_, trunc_normal_tf_

print("timm", timm.__version__, "torch", torch.__version__, "jax", jax.__version__)
functions = {"timm": trunc_normal_, "timm, tf": trunc_normal_tf_, "torch": torch.nn.init.trunc_normal_}
torch.manual_seed(0)
seen = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for name, function in functions.items():
        weight = function(torch.empty(1024, 1024, dtype=dtype), std=0.02).double()
        far = float((weight.abs() > 0.2).double().mean())  # more than ten standard deviations
        seen[name, dtype] = (float(weight.std()), float(weight.abs().max()), far)
        print(f"{name}, {dtype}: standard deviation {weight.std():.4f}, largest {weight.abs().max():.3f}, far {far:.5f}")
for (name, dtype), (deviation, largest, far) in seen.items():
    if name == "timm" and dtype != torch.float32:
        assert largest == 2 and deviation > 0.03 and far > 1e-4, "this has changed"
    else:
        assert deviation < 0.021 and largest < 0.12 and far == 0, "this has changed"
assert seen["timm", torch.bfloat16][2] > 0.001, "this has changed"
for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    drawn = jax.random.truncated_normal(jax.random.key(0), -10, 10, (1024, 1024), dtype)
    values = np.asarray(drawn.astype(jnp.float32)).astype(np.float64)
    low, high = float((values < -9).mean()), float((values > 9).mean())
    print(f"jax, {jnp.dtype(dtype)}: mean {values.mean():.4f}, deviation {values.std():.4f}, below -9: {low:.5f}, above 9: {high}")
    assert high == 0 and (low == 0 if dtype == jnp.float32 else low > 1e-4), "this has changed"
    if dtype == jnp.bfloat16:
        assert low > 0.005 and values.mean() < -0.05 and values.std() > 1.2, "this has changed"
print("as described")
PY
