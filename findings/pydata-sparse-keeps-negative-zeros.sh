#!/usr/bin/env bash
# Guess:    sparse.COO(mask * weight) holds one entry for each weight that the mask keeps, as scipy and numpy's count_nonzero count.
# Happens:  the product of a negative weight and a zero of the mask is -0.0, and pydata/sparse keeps it: only what is the same as
#           its fill value 0.0 bit for bit is left out. A weight with a tenth of its edges has more than half of its entries in
#           COO and in GCXS, nnz and density say so, and every product computes with them. `+ 0.0` before turns them into zeros.
# Seen with sparse 0.19.3, scipy 1.17.1, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet sparse==0.19.3 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import scipy.sparse
import sparse

generator = np.random.default_rng(0)
weight = generator.standard_normal((100, 100))
mask = np.abs(weight) >= np.quantile(np.abs(weight), 0.9)
masked = mask * weight
seen = {
    "numpy count_nonzero": int(np.count_nonzero(masked)),
    "scipy csr_array": scipy.sparse.csr_array(masked).nnz,
    "sparse COO": sparse.COO(masked).nnz,
    "sparse GCXS": sparse.GCXS(masked).nnz,
    "sparse COO of masked + 0.0": sparse.COO(masked + 0.0).nnz,
    "sparse COO times a COO mask": (sparse.COO(weight) * sparse.COO(mask)).nnz,
}
print("sparse", sparse.__version__, "entries kept by the mask:", int(mask.sum()), "of", mask.size)
for name, entries in seen.items():
    print(f"{name}: {entries} entries")
stored = sparse.COO(masked).data
print("values equal to zero among the entries of the COO:", int((stored == 0).sum()))
assert seen["numpy count_nonzero"] == seen["scipy csr_array"] == seen["sparse COO of masked + 0.0"] == 1000
assert seen["sparse COO"] == seen["sparse GCXS"] > 5000, "this has changed"
assert (stored == 0).sum() == np.signbit(masked[~mask]).sum(), "this has changed"
print("as described")
PY
