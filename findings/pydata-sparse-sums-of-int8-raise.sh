#!/usr/bin/env bash
# Guess:    sum, mean and std of a pydata/sparse matrix of quantized weights, in int8 or uint8, are those of the array that it
#           stands for, kept in 64 bits as numpy keeps them, whatever the size of the matrix.
# Happens:  they raise an OverflowError once the matrix has more places, absent ones included, than its type can count: 128 in
#           int8, 256 in uint8, 32,768 in int16. The number of places goes into a product with the fill value as a Python
#           integer, which numpy 2 refuses to make an int8. A small layer works and a larger one does not; a sum over one axis
#           fails where that axis is long. max works, and so do sums of booleans, of float16 and of int64, and scipy's of int8.
# Seen with sparse 0.19.3, scipy 1.17.1, numba 0.68.1 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'sparse==0.19.3' 'scipy==1.17.1' 'numba==0.68.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import numpy as np
import scipy
import sparse

warnings.simplefilter("error")  # a warning would end the script
print("sparse", sparse.__version__, "numpy", np.__version__, "scipy", scipy.__version__)
generator = np.random.default_rng(0)


def weight(rows, columns, dtype):
    return (generator.integers(1, 100, (rows, columns)) * (generator.random((rows, columns)) < 0.1)).astype(dtype)


def outcome(act):
    try:
        return act()
    except OverflowError as error:
        return f"OverflowError: {error}"


for dtype, works, fails in (("int8", 127, 128), ("uint8", 255, 256), ("int16", 32767, 32768)):
    seen = {}
    for size in (works, fails):
        array = np.zeros(size, dtype)
        array[:10] = 1
        seen[size] = outcome(lambda: int(sparse.COO.from_numpy(array).sum()))
    print(f"{dtype}, sum of ten ones by number of places:", seen)
    assert seen[works] == 10 and str(seen[fails]).startswith("OverflowError"), "this has changed"
array = weight(64, 64, "int8")
matrix = sparse.COO.from_numpy(array)
for name in ("sum", "mean", "std", "var", "prod"):
    found = outcome(lambda: getattr(matrix, name)())
    print(f"{name} of a 64 x 64 matrix in int8: {found}; numpy {getattr(array, name)()}")
    assert str(found).startswith("OverflowError"), "this has changed"
tall = weight(300, 4, "int8")
for given in (array, tall):
    found = outcome(lambda: sparse.COO.from_numpy(given).sum(axis=0).todense().tolist() == given.sum(axis=0).tolist())
    print(f"sum of {given.shape} in int8 over the first axis: right is {found}")
    assert (found is True) == (given is array), "this has changed"
for name, right in {
    "max": int(matrix.max()) == int(array.max()),
    "any": bool(matrix.any()) == bool(array.any()),
    "scipy's sum": int(scipy.sparse.csr_array(array).sum()) == int(array.sum()),
    "sum in float16": abs(float(matrix.astype("float16").sum()) / float(array.sum()) - 1) < 0.01,
    "sum of booleans": int((matrix != 0).sum()) == int((array != 0).sum()),
    "sum of int64": int(matrix.astype("int64").sum()) == int(array.sum()),
}.items():
    print(f"{name}: right is {right}")
    assert right, "this has changed"
print("as described")
PY
