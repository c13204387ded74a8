#!/usr/bin/env bash
# Guess:    `csr_array(weight, dtype=np.float32)` of a float64 weight is another matrix, as numpy's is: what is done with it leaves
#           the weight alone. And abs(), power(), count_nonzero(), max() and linalg.norm() change nothing anyhow.
# Happens:  only the values are converted; the new matrix has the old one's index arrays, and so has one built from (other values,
#           weight.indices, weight.indptr), the way to store a gradient or a score for each edge. The five sort the indices of the
#           matrix they are called on, in place. Where they were unsorted, as a product's are, the old matrix keeps its values in
#           the old order under the new indices: after the norm of the copy the weight has other values at its edges, and nothing
#           is said. eliminate_zeros() on the one breaks the other, too. astype() makes a matrix with index arrays of its own.
# Seen with scipy 1.17.1, numpy 2.4.6, Python 3.11, with csr_matrix as with csr_array.
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
from scipy.sparse import linalg

warnings.simplefilter("error")  # a warning would end the script
generator = np.random.default_rng(0)
factors = [generator.standard_normal((20, 20)) * (generator.random((20, 20)) < 0.15) for _ in range(2)]
calls = {
    "abs": abs,
    "power": lambda matrix: matrix.power(2),
    "count_nonzero": lambda matrix: matrix.count_nonzero(),
    "max": lambda matrix: matrix.max(axis=1),
    "norm": linalg.norm,
}
others = {
    "csr_array(weight, dtype=float32)": lambda weight: sparse.csr_array(weight, dtype=np.float32),
    "csr_matrix(weight, dtype=float32)": lambda weight: sparse.csr_matrix(weight, dtype=np.float32),
    "values of its own, same indices": lambda weight: sparse.csr_array(
        (np.ones(weight.nnz), weight.indices, weight.indptr), shape=weight.shape
    ),
    "weight.astype(float32)": lambda weight: weight.astype(np.float32),
}


def moved(other_of, call):
    """The share of the weight's edges that have another value once `call` has read the other matrix."""
    weight = sparse.csr_array(factors[0]) @ sparse.csr_array(factors[1])
    before = weight.toarray()
    other = other_of(weight)
    assert not np.shares_memory(other.data, weight.data) and not weight.has_sorted_indices
    call(other)
    return round(float((weight.toarray() != before)[before != 0].mean()), 2)


print("scipy", scipy.__version__)
seen = {}
for name, other_of in others.items():
    seen[name] = [moved(other_of, call) for call in calls.values()]
    print(f"{name}: edges of the weight that change", dict(zip(calls, seen[name], strict=True)))
independent = seen.pop("weight.astype(float32)")
assert all(min(shares) > 0.5 for shares in seen.values()) and independent == [0] * 5, "this has changed"


def without_zeros(other):
    other.data[::2] = 0
    other.eliminate_zeros()


dropped = moved(others["csr_array(weight, dtype=float32)"], without_zeros)
print("eliminate_zeros on the float32 matrix: edges of the weight that change", dropped)
assert dropped > 0.5, "this has changed"
print("as described")
PY
