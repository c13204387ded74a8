#!/usr/bin/env bash
# Guess:    jax's BCOO.fromdense(weight, nse=n), with fewer places than the weight has nonzeros, raises, at least where nothing is
#           traced and both numbers are known.
# Happens:  the first n in row order are kept and the others left out without a word, in BCSR too: the last rows of the layer
#           compute zeros. A pattern with more edges than an earlier one, stored with the earlier one's nse so that jit need not
#           compile again, loses them.
# Seen with jax 0.10.2 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import jax
import numpy as np
from jax.experimental import sparse

warnings.simplefilter("error")  # a warning would end the script
generator = np.random.default_rng(0)
weight = (generator.standard_normal((20, 20)) * (generator.random((20, 20)) < 0.2)).astype(np.float32)
nonzeros = int(np.count_nonzero(weight))
print("jax", jax.__version__, "nonzeros", nonzeros)
for form in (sparse.BCOO, sparse.BCSR):
    stored = np.asarray(form.fromdense(weight, nse=nonzeros // 2).todense())
    kept = int(np.count_nonzero(stored))
    empty = int((~stored.any(1)).sum())
    in_order = np.array_equal(stored[stored != 0], weight[weight != 0][:kept])
    print(f"{form.__name__} with nse={nonzeros // 2}: {kept} kept, empty rows {empty}, the first in row order: {in_order}")
    assert np.array_equal(np.asarray(form.fromdense(weight, nse=nonzeros).todense()), weight)
    assert kept == nonzeros // 2 and in_order and empty >= 5, "this has changed"
print("as described")
PY
