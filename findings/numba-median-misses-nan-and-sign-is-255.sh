#!/usr/bin/env bash
# Guess:    np.sign and np.median inside a numba function are numpy's: the sign of a mask of 0 and 255 is 0 and 1, whatever the
#           type, and the median of a weight with a NaN is NaN, as its mean, max and percentile in numba are.
# Happens:  the sign of an unsigned integer whose highest bit is set is that of a negative one: np.sign of uint8 pixels from 128 on
#           is 255, and of uint16, uint32 and uint64 likewise the largest number. A mask made by it keeps every edge and multiplies
#           its weight by 255. The median of [3, NaN, 1, 2, 5] is 3.0, as if NaN were a large number, in a place where
#           np.percentile(a, 50) is NaN. Nothing is said.
# Seen with numba 0.68.1 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numba==0.68.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import numba
import numpy as np

warnings.simplefilter("error")  # a warning would end the script


@numba.njit
def sign(values):
    return np.sign(values)


@numba.njit
def middle(values):
    return np.median(values), np.percentile(values, 50), np.max(values), np.mean(values)


print("numba", numba.__version__, "numpy", np.__version__)
for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
    largest = np.iinfo(dtype).max
    values = np.array([0, 1, 127, largest // 2, largest // 2 + 1, largest], dtype)
    print(f"{np.dtype(dtype)} {values.tolist()}: numba {sign(values).tolist()}, numpy {np.sign(values).tolist()}")
    assert sign(values).tolist() == [0, 1, 1, 1, largest, largest], "this has changed"
    assert np.sign(values).tolist() == [0, 1, 1, 1, 1, 1], "this has changed"
values = np.array([3.0, np.nan, 1.0, 2.0, 5.0])
found = middle(values)
print("median, percentile, max and mean with a NaN:", found, "; numpy's median:", float(np.median(values)))
assert found[0] == 3 and np.isnan(found[1:]).all() and np.isnan(np.median(values)), "this has changed"
print("as described")
PY
