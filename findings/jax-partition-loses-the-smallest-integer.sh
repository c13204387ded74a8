#!/usr/bin/env bash
# Guess:    jnp.partition(weight, k) of an int8 weight holds the weight's values, the k smallest first, as numpy's does, and
#           argpartition their places: a way to find the edges to prune.
# Happens:  the smallest ones are found as the largest of the negated values, and -128 negated is -128: it counts as the largest.
#           partition leaves it out and has another value twice; argpartition does not have it among the smallest. int16 and
#           int32 do so with their smallest values. Nothing is said. sort, argsort and lax.top_k are right.
# Seen with jax 0.10.2, numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import jax
import jax.numpy as jnp
import numpy as np

warnings.simplefilter("error")  # a warning would end the script
print("jax", jax.__version__)
for dtype in (np.int8, np.int16, np.int32):
    least = np.iinfo(dtype).min
    values = np.array([5, least, 100, 3], dtype)
    got = np.asarray(jnp.partition(jnp.asarray(values), 1))
    places = np.asarray(jnp.argpartition(jnp.asarray(values), 1))
    print(f"{values.dtype} {values.tolist()}: partition {got.tolist()}, argpartition picks {values[places].tolist()}")
    assert np.partition(values, 1)[0] == least and np.asarray(jnp.sort(jnp.asarray(values)))[0] == least
    assert least not in got and sorted(got.tolist()) == [3, 5, 5, 100], "this has changed"
    assert least not in values[places[:2]], "this has changed"
    without = np.where(values == least, least + 1, values)
    assert sorted(np.asarray(jnp.partition(jnp.asarray(without), 1)).tolist()) == sorted(without.tolist())
print("as described")
PY
