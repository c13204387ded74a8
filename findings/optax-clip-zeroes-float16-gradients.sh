#!/usr/bin/env bash
# Guess:    optax.clip_by_global_norm(1.0) scales gradients in float16 to the norm 1, like others: their norm is found in
#           float32.
# Happens:  the squares are summed in float16 and overflow where the norm passes 256, in one large tensor or one large gradient:
#           the norm is inf, every gradient is multiplied by 1 / inf, and the step does nothing. No NaN or inf is left that
#           apply_if_finite or a check of the updates would find: training just stands still. global_norm returns inf. Gradients
#           in bfloat16 and float32 are clipped as they should be.
# Seen with optax 0.2.8, jax 0.10.2, numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
import optax

clip = optax.clip_by_global_norm(1.0)
print("optax", optax.__version__, "jax", jax.__version__)
seen = {}
for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
    for size in (200.0, 300.0):
        gradients = {"large": jnp.array([size], dtype), "small": jnp.ones(100, dtype)}
        clipped, _ = clip.update(gradients, clip.init(gradients))
        leaves = [np.asarray(leaf, np.float64) for leaf in clipped.values()]
        seen[dtype.dtype.name, size] = round(float(np.sqrt(sum((leaf**2).sum() for leaf in leaves))), 2)
        norm = float(optax.global_norm(gradients))
        print(f"{dtype.dtype.name}, largest gradient {size}: norm {norm:.1f}, after clipping {seen[dtype.dtype.name, size]}")
stuck = seen.pop(("float16", 300.0))
assert all(abs(norm - 1) < 0.01 for norm in seen.values())
assert stuck == 0, "this has changed"
print("as described")
PY
