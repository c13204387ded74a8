#!/usr/bin/env bash
# Guess:    numpy's sum and mean of a bfloat16 weight, the type that safetensors.numpy and jax give it, are right to bfloat16's
#           rounding, as those of float16 are: sums are kept in more digits and rounded once.
# Happens:  every addition is rounded to 8 bits, and a sum stops growing once an addend is less than half of its last digit: of 4,000
#           ones it is 256, their mean 0.06. Of filters with 4,608 weights the L1 norms, a usual score for pruning, come out at a
#           quarter, the three smallest nearly alike; the mean size of a weight is 0.22 where it is 0.80. float16 is right along the
#           last axis, and falls short along another, where 4,000 ones make 2,048, and in cumsum. Nothing is said. linalg.norm and
#           matmul are right, as is sum(dtype=np.float32); jax's own sum is right for the same array.
# Seen with numpy 2.4.6, ml_dtypes 0.6.0, safetensors 0.8.0 and jax 0.10.2, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 ml_dtypes==0.6.0 safetensors==0.8.0 jax==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import warnings

import ml_dtypes
import numpy as np
from jax import numpy as jnp
from safetensors.numpy import load_file, save_file

warnings.simplefilter("error")  # a warning would end the script
types = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
generator = np.random.default_rng(0)
# Four filters of a 3 x 3 convolution over 512 channels, larger from one to the next.
filters = generator.standard_normal((4, 4608)) * np.array([[1.0], [1.1], [1.2], [2.0]])
save_file({name: filters.astype(kind) for name, kind in types.items()}, "filters.safetensors")
loaded = load_file("filters.safetensors")
weights = {name: loaded[name] for name in types}

measures = {
    "L1 norm": lambda size: size.sum(axis=1),
    "L1 norm, transposed": lambda size: np.ascontiguousarray(size.T).sum(axis=0),
    "mean": lambda size: size.mean(axis=1),
    "cumsum": lambda size: np.cumsum(size, axis=1)[:, -1] / 4608,
    "L2 norm": lambda size: np.linalg.norm(size, axis=1),
    "matmul": lambda size: size @ np.ones(4608, size.dtype),
    "L1 norm, float32": lambda size: size.sum(axis=1, dtype=np.float32),
    "L1 norm, jax": lambda size: np.asarray(jnp.asarray(size).sum(axis=1)),
}
print("numpy", np.__version__, "ml_dtypes", ml_dtypes.__version__, "loaded as", {name: str(w.dtype) for name, w in weights.items()})
right = {}
for name, measure in measures.items():
    found = {kind: measure(np.abs(weight)).astype(np.float64) for kind, weight in weights.items()}
    print(f"{name}:", {kind: values.round(3).tolist() for kind, values in found.items()})
    right[name] = [bool(np.allclose(values, found["float32"], rtol=0.02)) for values in found.values()]
ones = np.ones(4000, ml_dtypes.bfloat16)
print("4,000 ones in bfloat16: sum", ones.sum(), "mean", ones.mean())
assert float(ones.sum()) == 256, "this has changed"
assert right == {
    "L1 norm": [True, True, False],
    "L1 norm, transposed": [True, False, False],
    "mean": [True, True, False],
    "cumsum": [True, False, False],
    "L2 norm": [True, True, True],
    "matmul": [True, True, True],
    "L1 norm, float32": [True, True, True],
    "L1 norm, jax": [True, True, True],
}, f"this has changed: {right}"
print("as described")
PY
