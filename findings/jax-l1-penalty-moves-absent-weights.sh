#!/usr/bin/env bash
# Guess:    the gradient of |w| at w = 0 is 0 in jax, as it is in torch and numpy's sign: an L1 penalty leaves a weight that is zero
#           alone, and so absent weights, whose gradient of the loss is zero, stay absent.
# Happens:  jax differentiates abs to 1 at 0 and at -0.0. The penalty's gradient is 1 for every absent weight: SGD moves all of them by
#           learning rate times penalty in the first step, Adam by the whole learning rate, all to the same side, and none counts
#           as zero any more; the next step brings them back or further. keras.regularizers.L1 does the same on the jax backend;
#           mlx's abs has a gradient of 0. So has w * sign(w) in jax, and abs of a weight that is masked before.
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
generator = np.random.default_rng(0)
mask = generator.random((8, 16)) < 0.25
start = jnp.asarray(generator.standard_normal((8, 16)) * mask, jnp.float32)
x, y = (jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in ((64, 16), (64, 8)))
penalties = {
    "jnp.abs": lambda weight: jnp.abs(weight).sum(),
    "keras L1": keras.regularizers.L1(1.0),
    "w * sign(w)": lambda weight: (weight * jnp.sign(weight)).sum(),
    "abs of mask * w": lambda weight: jnp.abs(weight * mask).sum(),
}


def absent_after_a_step(optimizer, penalty):
    def loss(weight):
        return ((x @ (weight * mask).T - y) ** 2).mean() + 0.01 * penalty(weight)

    updates, _ = optimizer.update(jax.grad(loss)(start), optimizer.init(start), start)
    return np.unique(np.round(np.asarray(start + updates)[~mask], 6)).tolist()


print({name: version(name) for name in ("jax", "keras", "mlx")})
at_zero = {"jax": [float(jax.grad(jnp.abs)(zero)) for zero in (0.0, -0.0)], "mlx": float(mx.grad(mx.abs)(mx.array(0.0)))}
print("gradient of abs at zero:", at_zero)
seen = {}
for name, penalty in penalties.items():
    seen[name] = [absent_after_a_step(optimizer, penalty) for optimizer in (optax.sgd(0.1), optax.adam(0.1))]
    print(f"{name}: absent weights after one step of SGD are {seen[name][0]}, of Adam {seen[name][1]}")
assert at_zero == {"jax": [1, 1], "mlx": 0}, "this has changed"
for name in ("jnp.abs", "keras L1"):
    assert np.allclose(seen[name], [[-0.001], [-0.1]], atol=1e-4), "this has changed"
for name in ("w * sign(w)", "abs of mask * w"):
    assert not np.any(seen[name]), "this has changed"
print("as described")
PY
