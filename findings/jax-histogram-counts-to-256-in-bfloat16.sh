#!/usr/bin/env bash
# Guess:    jnp.histogram of a weight counts its values, whatever their type: the counts of a bfloat16 weight of a million numbers
#           add up to a million, within the rounding of bfloat16 at least, as the array's own sum does.
# Happens:  the counts are kept in the weight's type and ones are added to them one by one: no bin gets past 256 in bfloat16, 2,048
#           in float16. Of a million normal weights in ten bins the histogram is flat and adds up to 2,310; the 900,000 zeros of a
#           pruned weight count as 256, no more than its other bins. Nothing is said. weights=ones in float32 mends it. bincount
#           with weights, segment_sum, x.at[index].add and the gradient of an embedding's row stop there too; sum, cumsum, dot and
#           the gradient of repeat do not.
# Seen with jax 0.10.2 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import warnings

import jax
import jax.numpy as jnp
import numpy as np

warnings.simplefilter("error")  # a warning would end the script
print("jax", jax.__version__)
weight = jax.random.normal(jax.random.key(0), (1_000_000,))
pruned = jnp.where(jnp.abs(weight) > 1.645, weight, 0)
for dtype, stop in {jnp.bfloat16: 256, jnp.float16: 2048, jnp.float32: None}.items():
    name = jnp.dtype(dtype).name
    for kind, values in {"normal": weight.astype(dtype), "pruned": pruned.astype(dtype)}.items():
        counts = np.asarray(jnp.histogram(values, bins=10)[0].astype(jnp.float32))
        own = np.asarray(jnp.histogram(values, bins=10, weights=jnp.ones(values.size, jnp.float32))[0])
        print(f"{name}, {kind}: {counts.astype(int).tolist()}, in all {counts.sum():.0f}; with float32 ones {own.sum():.0f}")
        assert counts.max() == stop if stop else counts.sum() == 1_000_000, "this has changed"
        assert own.sum() == 1_000_000, "this has changed"
    ones, index, zero = jnp.ones(4000, dtype), jnp.zeros(4000, jnp.int32), jnp.zeros(1, dtype)
    short = {
        "bincount": jnp.bincount(index, weights=ones, length=1)[0],
        "segment_sum": jax.ops.segment_sum(ones, index, 1)[0],
        "at[index].add": zero.at[index].add(ones)[0],
        "gradient of rows": jax.grad(lambda rows: rows[index].sum())(jnp.ones(1, dtype))[0],
    }
    right = {
        "sum": ones.sum(),
        "cumsum": jnp.cumsum(ones)[-1],
        "dot": jnp.dot(ones, ones),
        "gradient of repeat": jax.grad(lambda row: jnp.repeat(row, 4000).sum())(jnp.ones(1, dtype))[0],
    }
    print(f"{name}, sums of 4,000 ones:", {title: float(value) for title, value in (short | right).items()})
    assert all(float(value) == (stop or 4000) for value in short.values()), "this has changed"
    assert all(float(value) == 4000 for value in right.values()), "this has changed"
print("as described")
PY
