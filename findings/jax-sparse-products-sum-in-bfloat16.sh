#!/usr/bin/env bash
# Guess:    a product of a sparse weight of jax (BCOO or BCSR) in bfloat16 is as exact as that of the same weight stored dense,
#           whose sums are kept in float32 and rounded once.
# Happens:  each sum is kept in bfloat16 and rounded after every addend. An output that adds up 300, 1000 or 4000 ones is 256 in all
#           three cases, as 256 + 1 is 256 in bfloat16; the dense product gives 300, 1000 and 4000. For random weights and inputs
#           after a ReLU the error is ten times the dense one, in float16 too. What is said for BCSR, that it falls back to another
#           implementation, is about speed. preferred_element_type=float32 of bcoo_dot_general, or inputs in float32, gives exact
#           sums.
# Seen with jax 0.10.2 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

warnings.simplefilter("ignore", sparse.SparseEfficiencyWarning)
generator = np.random.default_rng(0)
edges = (100, 300, 1000, 4000)
ones = np.zeros((len(edges), 8192), np.float32)
for row, number in zip(ones, edges, strict=True):
    row[generator.permutation(8192)[:number]] = 1
x, half = jnp.ones((8192, 2), jnp.bfloat16), jnp.asarray(ones, jnp.bfloat16)


def first(outputs):
    return np.asarray(outputs, np.float32)[:, 0].tolist()


sums = {"dense": first(half @ x)}
for kind in (sparse.BCOO, sparse.BCSR):
    weight = kind.fromdense(half)
    sums[kind.__name__] = first(weight @ x)
    sums[kind.__name__ + ", inputs in float32"] = first(weight @ x.astype(jnp.float32))
sums["BCOO, preferred_element_type=float32"] = first(
    sparse.bcoo_dot_general(
        sparse.BCOO.fromdense(half), x, dimension_numbers=(((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
)
print("jax", jax.__version__, "ones in each row:", list(edges))
for name, values in sums.items():
    print(f"{name}: {values}")
weight = generator.standard_normal((64, 4096)).astype(np.float32) / 64
weight[np.abs(weight) < np.quantile(np.abs(weight), 0.9)] = 0
inputs = np.maximum(generator.standard_normal((4096, 32)), 0)
ratios = []
for dtype in (jnp.bfloat16, jnp.float16):
    w, x = jnp.asarray(weight, dtype), jnp.asarray(inputs, dtype)
    exact = np.asarray(w, np.float64) @ np.asarray(x, np.float64)
    products = {"dense": w @ x, "BCOO": sparse.BCOO.fromdense(w) @ x, "BCSR": sparse.BCSR.fromdense(w) @ x}
    errors = {
        name: float(np.linalg.norm(np.asarray(product, np.float64) - exact) / np.linalg.norm(exact))
        for name, product in products.items()
    }
    ratios += [errors["BCOO"] / errors["dense"], errors["BCSR"] / errors["dense"]]
    print(f"random weights at 10 % density, {dtype.__name__}: relative errors", {k: f"{v:.1e}" for k, v in errors.items()})
wrong = [sums.pop(name) for name in ("BCOO", "BCSR")]
assert wrong == [[100, 256, 256, 256]] * 2 and min(ratios) > 5, "this has changed"
assert all(values == list(edges) for values in sums.values()), "this has changed"
print("as described")
PY
