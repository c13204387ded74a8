#!/usr/bin/env bash
# Guess:    a weight in float16 that is zero and has a gradient of zero, as the masked ones of a layer do, stays zero under Adam:
#           its moments are zero, and eps guards the division by the second one's root.
# Happens:  the step is computed in the weight's type, and the default eps of 1e-8 is zero there: zero divided by zero, so that
#           the absent weights, and they alone, are NaN after the first step. So it is with adamw, amsgrad, adamax, nadam,
#           adabelief, adan and rmsprop; radam, lamb, lion, adagrad, sm3 and novograd keep the zeros. In bfloat16 and float32 all
#           of them do, and so does adam in float16 with eps=1e-4.
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

names = "adam adamw amsgrad adamax nadam adabelief adan rmsprop radam lamb lion adagrad sm3 novograd".split()
optimizers = {name: getattr(optax, name)(1e-2) for name in names} | {"adam, eps=1e-4": optax.adam(1e-2, eps=1e-4)}


def trained(optimizer, dtype):
    """A weight that is absent and one that is not, after three steps."""
    weights = jnp.array([0, 1], dtype)
    state = optimizer.init(weights)
    for _ in range(3):
        updates, state = optimizer.update(jnp.array([0, 0.1], dtype), state, weights)
        weights = optax.apply_updates(weights, updates)
    return np.asarray(weights, np.float32)


print("optax", optax.__version__, "jax", jax.__version__)
for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
    seen = {name: trained(optimizer, dtype) for name, optimizer in optimizers.items()}
    lost = [name for name, (absent, _) in seen.items() if np.isnan(absent)]
    print(f"{dtype.dtype.name}: absent weights are NaN under {', '.join(lost) or 'none'}")
    assert all(np.isfinite(present) for _, present in seen.values())
    assert all(seen[name][0] == 0 for name in seen if name not in lost)
    assert lost == (names[:8] if dtype is jnp.float16 else []), "this has changed"
print("as described")
PY
