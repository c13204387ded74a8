#!/usr/bin/env bash
# Guess:    pyarrow.SparseCOOTensor.from_dense_numpy gives each nonzero of an array its own coordinates, whatever the array's
#           order in memory, as pyarrow's CSR and CSC matrices and its dense tensor do.
# Happens:  those of a weight in Fortran order, the transpose of an ordinary one for instance, are right only where it is square.
#           Of another shape the values get coordinates of other places, some of them outside the tensor's own shape, and nothing
#           is said. A slice with steps is right.
# Seen with pyarrow 26.0.1, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyarrow==26.0.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import pyarrow as pa

generator = np.random.default_rng(0)


def misplaced(array):
    """How many values have coordinates where the array has another value, and how many lie outside of its shape."""
    tensor = pa.SparseCOOTensor.from_dense_numpy(array)
    values, coordinates = tensor.to_numpy()
    assert tensor.shape == array.shape and sorted(values.ravel()) == sorted(array[array != 0])
    outside = (coordinates >= array.shape).any(axis=1)
    held = array[tuple(np.minimum(coordinates, np.array(array.shape) - 1).T)]
    return int((outside | (held != values.ravel())).sum()), int(outside.sum())


print("pyarrow", pa.__version__)
for shape in ((6, 6), (4, 8), (8, 4)):
    weight = np.zeros(shape, np.float32)
    places = generator.random(shape) < 0.7
    weight[places] = np.arange(1, places.sum() + 1)  # each value once
    layouts = {
        "C order": weight,
        "slice with steps": np.repeat(weight, 2, axis=1)[:, ::2],
        "Fortran order": np.asfortranarray(weight),
    }
    for layout, array in layouts.items():
        wrong, outside = misplaced(array)
        print(f"{shape}, {layout}: {wrong} of {places.sum()} values misplaced, {outside} outside")
        expected = layout == "Fortran order" and shape != (6, 6)
        assert (wrong > places.sum() / 2 and outside > 0) if expected else wrong == 0, "this has changed"
        for kind in (pa.SparseCSRMatrix, pa.SparseCSCMatrix):
            assert (kind.from_dense_numpy(array).to_tensor().to_numpy() == weight).all()
print("as described")
PY
