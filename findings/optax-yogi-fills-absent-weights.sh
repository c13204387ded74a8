#!/usr/bin/env bash
# Guess:    a weight that is zero and has a gradient of zero, as the masked ones of a layer do, stays zero under an adaptive
#           optimizer of optax without weight decay: its first moment starts at zero and stays there.
# Happens:  so it is with adam, adabelief, radam, lion and rmsprop. yogi starts both of its moments at 1e-6, the first one too, so
#           that its first steps lower every weight by an amount that has nothing to do with the loss: after one step all absent
#           weights have the same small negative value, and none counts as zero any more. optax.yogi has no option for that;
#           optax.scale_by_yogi(initial_accumulator_value=0) keeps the zeros.
# Seen with optax 0.2.8, jax 0.10.2 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
import optax

generator = np.random.default_rng(0)
start = generator.standard_normal((32, 64)).astype(np.float32)
start[np.abs(start) < np.quantile(np.abs(start), 0.9)] = 0
mask = start != 0
x = jnp.asarray(generator.standard_normal((64, 16)).astype(np.float32))


def trained(optimizer, steps):
    weight = jnp.asarray(start)
    state = optimizer.init(weight)
    for _ in range(steps):
        gradient = jax.grad(lambda weight: jnp.mean((jnp.where(mask, weight, 0) @ x - 1) ** 2))(weight)
        updates, state = optimizer.update(gradient, state, weight)
        weight = optax.apply_updates(weight, updates)
    return np.asarray(weight)[~mask]


print("optax", optax.__version__, "jax", jax.__version__)
optimizers = {name: getattr(optax, name)(0.1) for name in ("adam", "adabelief", "radam", "lion", "rmsprop", "yogi")}
optimizers["yogi from 0"] = optax.chain(optax.scale_by_yogi(initial_accumulator_value=0), optax.scale_by_learning_rate(0.1))
filled = {}
for name, optimizer in optimizers.items():
    for steps in (1, 20):
        absent = trained(optimizer, steps)
        filled[name, steps] = float((absent != 0).mean())
        print(f"{name}, {steps} steps: absent weights that are not zero {filled[name, steps]:.2f},", end=" ")
        print(f"from {absent.min():.1e} to {absent.max():.1e}")
assert all(share == (name == "yogi") for (name, _), share in filled.items()), "this has changed"
absent = trained(optimizers["yogi"], 20)
assert absent.min() == absent.max() < -1e-5, "this has changed"
print("as described")
PY
