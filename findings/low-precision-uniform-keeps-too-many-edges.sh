#!/usr/bin/env bash
# Guess:    torch.rand_like(weight) < p, and jax.random.uniform(key, shape, weight.dtype) < p, keep a share p of the edges within
#           sampling noise, whatever the weight's precision.
# Happens:  in bfloat16 torch gives 0 for what would round to 1, one number in 512, and jax draws multiples of 1/128, 0 among them;
#           all zeros are kept, however small p is. For p = 0.001 torch keeps three times as many edges and jax nearly eight
#           times, for 0.0001 twenty and almost eighty times; at 0.01 it is a fifth and a half too many, at 0.1 a fiftieth.
#           float16 has the same in small: 1.9 times in jax at 0.001. jax.random.bernoulli keeps too many where p itself is in bfloat16; torch's bernoulli_(p) and dropout
#           are right in every precision, as is drawing in float32.
# Seen with torch 2.15.0, jax 0.10.2 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'jax==0.10.2' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import jax
import torch
from jax import numpy as jnp

warnings.simplefilter("error")  # a warning would end the script
torch.manual_seed(0)
key = jax.random.key(0)
shape, shares = (4000, 1000), (0.1, 0.01, 0.001, 0.0001)
torch_types = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
jax_types = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}


def row(density_of):
    """For each share asked for: how many times as many edges are kept."""
    return [round(float(density_of(share)) / share, 2) for share in shares]


seen = {}
for name, kind in torch_types.items():
    weight = torch.zeros(shape, dtype=kind)
    seen["torch.rand_like", name] = row(lambda p, w=weight: (torch.rand_like(w) < p).float().mean())
    seen["torch bernoulli_", name] = row(lambda p, w=weight: w.bernoulli_(p).float().mean())
    seen["torch dropout", name] = row(
        lambda p, w=weight: (torch.nn.functional.dropout(torch.ones_like(w), 1 - p) != 0).float().mean()
    )
for name, kind in jax_types.items():
    seen["jax uniform", name] = row(lambda p, k=kind: jnp.mean(jax.random.uniform(key, shape, k) < p, dtype=jnp.float32))
    seen["jax bernoulli", name] = row(
        lambda p, k=kind: jnp.mean(jax.random.bernoulli(key, jnp.asarray(p, k), shape), dtype=jnp.float32)
    )
print("torch", torch.__version__, "jax", jax.__version__, "edges kept per edge asked for, at densities", shares)
for (source, name), factors in seen.items():
    print(f"{source}, {name}: {factors}")
zeros = [
    float((torch.rand(shape, dtype=torch.bfloat16) == 0).float().mean()),
    float(jnp.mean(jax.random.uniform(key, shape, jnp.bfloat16) == 0)),
]
print("numbers that are 0 in bfloat16, one in", [round(1 / share) for share in zeros])
assert abs(zeros[0] * 512 - 1) < 0.1 and abs(zeros[1] * 128 - 1) < 0.1, "this has changed"
for source in ("torch bernoulli_", "torch dropout"):
    assert all(0.7 < factor < 1.3 for name in torch_types for factor in seen[source, name]), "this has changed"
for source in ("torch.rand_like", "jax uniform", "jax bernoulli"):
    assert all(0.7 < factor < 1.3 for factor in seen[source, "float32"]), "this has changed"
assert seen["torch.rand_like", "bfloat16"][2] > 2.5 and seen["torch.rand_like", "bfloat16"][3] > 15, "this has changed"
for source in ("jax uniform", "jax bernoulli"):
    assert seen[source, "bfloat16"][2] > 6 and seen[source, "bfloat16"][3] > 60, "this has changed"
assert seen["jax uniform", "float16"][2] > 1.7, "this has changed"
print("as described")
PY
