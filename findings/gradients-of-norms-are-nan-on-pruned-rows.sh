#!/usr/bin/env bash
# Guess:    a penalty on the norms of a weight's rows, which is to prune whole units, has a gradient of zero at a row that is pruned
#           already, in jax and mlx as in torch; Keras's own OrthogonalRegularizer, which divides rows by their norms, at least.
# Happens:  jnp.linalg.norm and mlx's linalg.norm along an axis have a gradient of NaN at a row of zeros; only that row becomes NaN in
#           the first step, and whatever reads it in the next forward. Nothing is said, as the penalty itself is finite.
#           OrthogonalRegularizer(mode="rows") has it too. jax's norm over a whole matrix and its L1 norm of rows are finite,
#           and optax.safe_norm is what guards the root.
# Seen with jax 0.10.2, optax 0.2.8, keras 3.15.1, mlx 0.32.4 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 optax==0.2.8 keras==3.15.1 'mlx[cpu]==0.32.4' numpy==2.4.6
KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import jax
import keras
import mlx.core as mx
import numpy as np
import optax
from jax import numpy as jnp

mx.set_default_device(mx.cpu)
weight = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
weight[2] = 0
penalties = {
    "jnp.linalg.norm of rows": lambda w: jnp.linalg.norm(w, axis=1).sum(),
    "jnp.linalg.norm of rows, L1": lambda w: jnp.linalg.norm(w, ord=1, axis=1).sum(),
    "jnp.linalg.norm of all": jnp.linalg.norm,
    "optax.safe_norm of rows": lambda w: optax.safe_norm(w, 1e-6, axis=1).sum(),
    "keras OrthogonalRegularizer": keras.regularizers.OrthogonalRegularizer(0.01, mode="rows"),
    "keras L2": keras.regularizers.L2(0.01),
}
seen = {}
for name, penalty in penalties.items():
    seen[name] = bool(jnp.isfinite(penalty(jnp.asarray(weight)))), np.asarray(jax.grad(penalty)(jnp.asarray(weight)))


def rows_in_mlx(w):
    return mx.linalg.norm(w, axis=1).sum()


finite = bool(np.isfinite(np.array(rows_in_mlx(mx.array(weight)))))
seen["mlx linalg.norm of rows"] = finite, np.array(mx.grad(rows_in_mlx)(mx.array(weight)))
print({name: version(name) for name in ("jax", "keras", "mlx")}, "row 2 of the weight is zero")
rows = {}
for name, (value, gradient) in seen.items():
    rows[name] = np.flatnonzero(np.isnan(gradient).any(axis=1)).tolist()
    print(f"{name}: the penalty is finite {value}; rows with a gradient of NaN {rows[name]}")
    assert value, "this has changed"
for name in ("jnp.linalg.norm of rows", "mlx linalg.norm of rows", "keras OrthogonalRegularizer"):
    assert 2 in rows.pop(name), "this has changed"
assert not any(rows.values()), "this has changed"
print("as described")
PY
