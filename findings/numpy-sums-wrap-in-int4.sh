#!/usr/bin/env bash
# Guess:    numpy's sum of a weight in 4-bit integers, the type that jax and onnx give it, is kept in int64, as that of int8 is;
#           the mean is kept in float64.
# Happens:  both are kept in 4 bits and wrap around, and nothing is said: a hundred ones have the sum 4 and the mean 0, and the
#           products of two such vectors add up to 4. uint4 and int2 do so too. The number of kept edges of a mask stored in four
#           bits is wrong; count_nonzero is right, and so is the sum with dtype=np.int64.
# Seen with ml_dtypes 0.6.0, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ml_dtypes==0.6.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import ml_dtypes
import numpy as np

warnings.simplefilter("error")  # a warning would end the script
print("ml_dtypes", ml_dtypes.__version__, "numpy", np.__version__)
seen = {}
for dtype in (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, np.int8):
    ones = np.ones(100, dtype)
    seen[ones.dtype.name] = [
        int(ones.sum()),
        float(ones.mean()),
        int(np.cumsum(ones)[-1]),
        int(np.count_nonzero(ones)),
        int(ones.sum(dtype=np.int64)),
    ]
    print(f"{ones.dtype.name}: sum, mean, last of cumsum, count_nonzero, sum in int64: {seen[ones.dtype.name]}")
assert seen["int8"] == [100, 1, 100, 100, 100]
products = int(np.dot(np.ones(100, ml_dtypes.int4), np.ones(100, ml_dtypes.int4)))
print("int4: products of two vectors of ones add up to", products)
assert products == 4, "this has changed"
assert seen["int4"] == [4, 0, 4, 100, 100] and seen["uint4"][0] == 4 and seen["int2"][0] == 0, "this has changed"
print("as described")
PY
