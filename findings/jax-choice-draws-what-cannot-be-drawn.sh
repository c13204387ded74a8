#!/usr/bin/env bash
# Guess:    jax.random.choice(key, n, (k,), replace=False, p=p) returns indices that p gives a probability above zero. Where there are
#           less than k of those, numpy's choice raises; jax, whose p may be traced, fills up with something that stands out, at least.
# Happens:  it goes on with indices of probability zero, the first ones in order, and nothing tells them from drawn ones. Edges to be
#           grown, drawn by a score that is zero where an edge is present, contain present edges once the layer is nearly full: the
#           layer grows by fewer than asked for, and the same edges at the front are picked in every round.
# Seen with jax 0.10.2 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import jax
import numpy as np
from jax import numpy as jnp

warnings.simplefilter("error")  # a warning would end the script
size, grow = 400, 40
generator = np.random.default_rng(0)
print("jax", jax.__version__)
seen = {}
for absent in (100, 40, 15):
    mask = np.ones(size, bool)
    mask[generator.choice(np.arange(100, size), absent, replace=False)] = False
    p = ~mask / absent
    draws = [np.asarray(jax.random.choice(jax.random.key(seed), size, (grow,), replace=False, p=jnp.asarray(p))) for seed in range(5)]
    present = [np.sort(drawn[mask[drawn]]) for drawn in draws]
    grown = [int((~mask[drawn]).sum()) for drawn in draws]
    try:
        generator.choice(size, grow, replace=False, p=p)
        of_numpy = "draws"
    except ValueError as error:
        of_numpy = f"ValueError: {error}"
    print(f"{absent} absent edges, {grow} to be grown, in five draws: {grown} grown; present ones {[len(one) for one in present]}")
    print("    which present ones:", present[0].tolist(), "; numpy", of_numpy)
    seen[absent] = grown, [one.tolist() for one in present], of_numpy == "draws"
for absent in (100, 40):
    assert seen[absent] == ([grow] * 5, [[]] * 5, True), "this has changed"
assert seen[15] == ([15] * 5, [list(range(25))] * 5, False), "this has changed"
print("as described")
PY
