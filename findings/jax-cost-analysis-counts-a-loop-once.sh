#!/usr/bin/env bash
# Guess:    the FLOPs that jax's cost_analysis gives for a compiled program, and flax's tabulate(compute_flops=True) for a module,
#           are those of all that it computes: ten equal layers run by lax.scan count as ten layers in a Python loop do, and a
#           recurrent layer over 50 time steps ten times as much as over 5.
# Happens:  the body of a loop is counted once, however often it runs. A scan or fori_loop over ten layers, the usual way to keep
#           compilation short, has the FLOPs of one layer, and with unroll=5 those of five; an nn.RNN over LSTM cells has the same
#           number for 5 and for 50 steps, in flax's table too. Nothing tells that there is a loop.
# Seen with jax 0.10.2, flax 0.12.8 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import re

import flax
import jax
import jax.numpy as jnp
from flax import linen

print("jax", jax.__version__, "flax", flax.__version__)
x, weights = jnp.ones((64, 128)), jnp.ones((10, 128, 128))
one_layer = 2 * 64 * 128 * 128


def in_python(x, weights):
    for weight in weights:
        x = jax.nn.relu(x @ weight)
    return x


def scanned(x, weights, unroll=1):
    return jax.lax.scan(lambda x, weight: (jax.nn.relu(x @ weight), None), x, weights, unroll=unroll)[0]


def looped(x, weights):
    return jax.lax.fori_loop(0, 10, lambda i, x: jax.nn.relu(x @ weights[i]), x)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


layers = {
    "Python loop": flops(in_python, x, weights),
    "scan": flops(scanned, x, weights),
    "scan, unroll=5": flops(lambda x, weights: scanned(x, weights, 5), x, weights),
    "fori_loop": flops(looped, x, weights),
}
layers = {name: count / one_layer for name, count in layers.items()}
for name, count in layers.items():
    print(f"ten layers, {name}: {count:.2f} times the FLOPs of one")
assert jnp.allclose(in_python(x, weights), scanned(x, weights)) and jnp.allclose(in_python(x, weights), looped(x, weights))
seen = {}
for steps in (5, 50):
    module, x = linen.RNN(linen.LSTMCell(32)), jnp.ones((2, steps, 16))
    parameters = module.init(jax.random.key(0), x)
    table = linen.tabulate(module, jax.random.key(0), compute_flops=True, console_kwargs={"width": 200})(x)
    in_table = int(re.search(rf"RNN .*float32\S*\[2,{steps},32\]\s*│\s*(\d+)", table)[1])
    seen[steps] = flops(module.apply, parameters, x), in_table
    print(f"LSTM over {steps} time steps: {seen[steps][0]:.0f} FLOPs compiled, {seen[steps][1]} in flax's table,", end=" ")
    print(f"{steps * 2 * 2 * (16 + 32) * 4 * 32} in its products")
assert round(layers["Python loop"], 1) == 10 and round(layers["scan"], 1) == 1, "this has changed"
assert round(layers["scan, unroll=5"], 1) == 5 and round(layers["fori_loop"], 1) == 1, "this has changed"
assert seen[5] == seen[50] and max(seen[50]) < 50 * 2 * 2 * (16 + 32) * 4 * 32 / 40, "this has changed"
print("as described")
PY
