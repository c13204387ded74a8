#!/usr/bin/env bash
# Guess:    the mean of a sparse float32 matrix over an axis is as exact as the mean of all of it, as its sum over the axis is,
#           and as numpy's mean of the dense array: sums are kept in float64, or added pairwise.
# Happens:  mean(axis) adds one value after the other in float32. A row of ten million values of 0.1 has a mean of 0.092, of a
#           million 0.0991; past 2^24 equal ones it stops growing. mean() and sum(axis=1) of the same matrix are right; but
#           sum(axis=0), the sums of its columns, adds up in the same way: 8 % off. CSC has the two axes exchanged, and no
#           warning is given. `matrix.astype(np.float64)` before mends it.
# Seen with scipy 1.17.1, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import numpy as np
import scipy
from scipy import sparse

warnings.simplefilter("error")  # a warning would end the script


def deviations(matrix):
    """How far each way of averaging is from 0.1, in per cent; the one row or column of the matrix holds that value only."""
    axis = int(matrix.shape[0] == 1)
    means = {
        "mean()": matrix.mean(),
        "mean over the long axis": matrix.mean(axis=axis)[0],
        "sum over the long axis": matrix.sum(axis=axis)[0] / matrix.nnz,
        "numpy, dense": matrix.toarray().mean(axis=axis)[0] if axis else 0.1,
        "in float64": matrix.astype(np.float64).mean(axis=axis)[0],
    }
    return {name: round(100 * abs(float(mean) / 0.1 - 1), 2) for name, mean in means.items()}


print("scipy", scipy.__version__)
for length in (1_000_000, 10_000_000):
    places, ends = np.arange(length), np.array([0, length])
    values = np.full(length, 0.1, np.float32)
    row = sparse.csr_array((values, places, ends), shape=(1, length))
    column = sparse.csr_array((values, np.zeros(length, int), np.arange(length + 1)), shape=(length, 1))
    rows, columns = deviations(row), deviations(column)
    print(f"{length} values of 0.1, per cent off: row {rows}, column {columns}")
    least = 0.5 if length == 1_000_000 else 5
    assert rows["mean over the long axis"] > least and columns["mean over the long axis"] > least, "this has changed"
    assert rows["sum over the long axis"] == 0 and columns["sum over the long axis"] > least, "this has changed"
    for seen in (rows, columns):
        assert seen["mean()"] == seen["numpy, dense"] == seen["in float64"] == 0
print("as described")
PY
