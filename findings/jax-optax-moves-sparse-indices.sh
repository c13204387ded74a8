#!/usr/bin/env bash
# Guess:    a sparse weight of jax (BCOO) trains with optax as the gradient that jax.experimental.sparse.grad returns for it
#           suggests: the values change, and the pattern stays, or something raises.
# Happens:  the gradient has the weight's indices as its second leaf, and optax takes them for numbers like the others: it scales
#           them and adds them to the weight's indices, which are rounded back to integers. One step of SGD with a learning rate of
#           0.1 moves every edge by about a tenth towards the first row and column; Adam with 0.001 moves every edge by a row and a
#           column a step, until it falls out of the matrix. clip_by_global_norm adds the indices to the norm. Nothing is said.
#           Differentiating and updating weight.data alone is right.
# Seen with jax 0.10.2, optax 0.2.8 and numpy 2.4.6, CPU, Python 3.11.
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
from jax.experimental import sparse

generator = np.random.default_rng(0)
dense = generator.standard_normal((32, 64)).astype(np.float32)
dense[np.abs(dense) < np.quantile(np.abs(dense), 0.9)] = 0
weight = sparse.BCOO.fromdense(jnp.asarray(dense))
x = jnp.asarray(generator.standard_normal((64, 16)).astype(np.float32))


def loss(weight):
    return jnp.mean((weight @ x - 1) ** 2)


def trained(optimizer, weight, gradient, steps=1):
    state = optimizer.init(weight)
    for _ in range(steps):
        updates, state = optimizer.update(gradient(weight), state, weight)
        weight = optax.apply_updates(weight, updates)
    return weight


gradient = sparse.grad(loss)
print("jax", jax.__version__, "optax", optax.__version__, "edges", weight.nse)
moved, last = {}, {}
for name, optimizer, steps in (("SGD", optax.sgd(0.1), 1), ("Adam", optax.adam(1e-3), 10)):
    after = trained(optimizer, weight, gradient, steps)
    outside = (after.indices < 0) | (after.indices >= jnp.asarray(weight.shape))
    moved[name] = np.asarray((after.indices != weight.indices).any(1)).mean(), np.asarray(outside.any(1)).mean()
    last[name] = np.asarray(weight.indices[-1] - after.indices[-1]).tolist()
    print(f"{name}, {steps} step(s): edges that moved {moved[name][0]:.2f}, that are outside of the matrix", end=" ")
    print(f"{moved[name][1]:.2f}; the last edge went from {weight.indices[-1]} to {after.indices[-1]}")
norm, norm_of_values = float(optax.tree.norm(gradient(weight))), float(jnp.linalg.norm(gradient(weight).data))
print(f"norm of the gradient by optax {norm:.1f}, of its values {norm_of_values:.3f}")
of_values = jax.grad(lambda values: loss(sparse.BCOO((values, weight.indices), shape=weight.shape)))
assert np.allclose(of_values(weight.data), gradient(weight).data)
values = trained(optax.adam(1e-3), weight.data, of_values, 100)
assert loss(sparse.BCOO((values, weight.indices), shape=weight.shape)) < loss(weight)
assert moved["SGD"][0] > 0.9 and moved["SGD"][1] == 0 and moved["Adam"][0] == 1, "this has changed"
assert moved["Adam"][1] > 0.2 and last["Adam"] == [10, 10] and norm > 100 * norm_of_values, "this has changed"
print("as described")
PY
