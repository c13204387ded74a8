#!/usr/bin/env bash
# Guess:    a scipy sparse matrix with several entries at one place, which stands for their sum, converts to what that sum converts
#           to: astype(bool) is True where the weight is not zero, astype(int) rounds the sum down. abs, power, max and
#           count_nonzero add up first.
# Happens:  astype converts each entry and the results are added: 0.6 + 0.6 as int is 0 where it should be 1, an edge that is gone;
#           4 - 4 as bool is True, an edge that is not there. nonzero() lists the place of 0.6 + 0.6 twice and the place of 4 - 4,
#           which counts as zero elsewhere, twice too. COO, CSR, CSC and BSR do so, as arrays and as matrices, and nothing is said.
#           A weight put together by adding gradients or paths into COO is the usual case. sum_duplicates() before mends astype;
#           the entry that is zero it leaves to eliminate_zeros().
# Seen with scipy 1.17.1 and numpy 2.4.6, CPU, Python 3.11.
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


def parts():
    """Values, their columns and where rows start: new arrays each time, as some methods change them in place."""
    return np.array([0.6, 0.6, -3.0, 2.0, 4.0, -4.0]), np.array([1, 1, 0, 2, 2, 2]), np.array([0, 2, 4, 6])


def bsr():
    values, columns, starts = parts()
    return sparse.bsr_array((values.reshape(-1, 1, 1), columns, starts), (3, 3))


forms = {
    "coo_array": lambda: sparse.coo_array((parts()[0], (np.repeat(np.arange(3), 2), parts()[1])), (3, 3)),
    "csr_array": lambda: sparse.csr_array(parts(), (3, 3)),
    "csc_array": lambda: sparse.csc_array(parts(), (3, 3)),
    "bsr_array": bsr,
    "csr_matrix": lambda: sparse.csr_matrix(parts(), (3, 3)),
}
print("scipy", scipy.__version__, "numpy", np.__version__)
for name, make in forms.items():
    dense = make().toarray()
    whole, there = make().astype(int).toarray(), make().astype(bool).toarray()
    places = len(make().nonzero()[0])
    right = dense.astype(int)
    print(f"{name}: as int {whole[whole != 0].tolist()}, of the dense one {right[right != 0].tolist()};", end=" ")
    print(f"edges as bool {there.sum()}, nonzero() {places}, count_nonzero() {make().count_nonzero()}, dense {(dense != 0).sum()}")
    assert sorted(whole.ravel()) == [-3] + [0] * 7 + [2], "this has changed"
    assert there.sum() == 4 and places == 6 and make().count_nonzero() == (dense != 0).sum() == 3, "this has changed"
    assert np.array_equal(abs(make()).toarray(), abs(dense)) and make().max() == dense.max(), "this has changed"
    assert np.allclose(make().power(2).toarray(), dense**2), "this has changed"
    if name != "bsr_array":
        summed = make()
        summed.sum_duplicates()
        assert np.array_equal(summed.astype(int).toarray(), dense.astype(int)), "this has changed"
        assert np.array_equal(summed.astype(bool).toarray(), dense != 0), "this has changed"
print("as described")
PY
