#!/usr/bin/env bash
# Guess:    scipy.io.mmwrite of a weight in float16 or bfloat16 writes its values, which float64 holds exactly, or raises for a
#           type that it does not know; sparse matrices of these types are refused by scipy.
# Happens:  a dense array of any type that mmwrite has no code for is cast to integers, and nothing is said: the file is a valid
#           "array integer" one, 0.5 is 0, -1.25 is -1. A weight of which all values are below one is all zero. float32 and
#           float64 are right, and savemat writes the same arrays right.
# Seen with scipy 1.17.1, ml_dtypes 0.6.0, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet scipy==1.17.1 ml_dtypes==0.6.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import warnings

import ml_dtypes
import numpy as np
import scipy
from scipy import io, sparse

warnings.simplefilter("error")  # a warning would end the script
values = np.array([[0.5, -1.25], [2.75, 0.0]])
print("scipy", scipy.__version__)
for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32, np.float64):
    weight = values.astype(dtype)
    assert (weight.astype(np.float64) == values).all()
    io.mmwrite("weight.mtx", weight)
    with open("weight.mtx") as file:
        header = file.readline().split()[2:]
    read = io.mmread("weight.mtx")
    io.savemat("weight.mat", {"w": weight})
    print(f"{weight.dtype}: {' '.join(header)}, {read.tolist()}")
    narrow = weight.dtype.itemsize < 4
    assert (header[1] == "integer") == narrow, "this has changed"
    assert (read == (np.trunc(values) if narrow else values)).all(), "this has changed"
    assert (io.loadmat("weight.mat")["w"] == values).all()
    try:
        sparse.coo_array(weight)
    except ValueError as error:
        print("  a sparse one:", str(error)[:50])
        assert narrow
print("as described")
PY
