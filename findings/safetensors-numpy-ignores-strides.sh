#!/usr/bin/env bash
# Guess:    `safetensors.numpy.save_file` stores the values of an array, whatever its layout in memory, as its torch twin does or
#           refuses to do ("non contiguous tensor").
# Happens:  the memory is stored and the strides are not looked at. A transposed, Fortran-ordered or sliced array comes back with its
#           shape and other values, and nothing is said. `np.ascontiguousarray` before saving gives the right file.
# Seen with safetensors 0.8.0, numpy 2.4.6, Python 3.11: masks and weights that were transposed on the way to a file are wrong in it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

whole = np.arange(6, dtype=np.float32).reshape(2, 3)
arrays = {"contiguous": whole, "transposed": whole.T, "sliced": whole[:, ::2], "fortran": np.asfortranarray(whole)}
save_file(arrays, "as_given.safetensors")
save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, "contiguous.safetensors")
stored, right = load_file("as_given.safetensors"), load_file("contiguous.safetensors")
print("safetensors", safetensors.__version__, "numpy", np.__version__)
for name, array in arrays.items():
    print(f"{name}: given {array.tolist()}, came back {stored[name].tolist()}")
    assert stored[name].shape == array.shape
    assert np.array_equal(right[name], array)
    assert np.array_equal(stored[name], array) == (name == "contiguous"), "this has changed"
print("as described")
PY
