#!/usr/bin/env bash
# Guess:    flax's msgpack checkpoints, webdataset's tensor files and pyarrow's tensors bring back the numbers of the array that
#           they were given, also of one in big-endian order (">f4", as IDX, FITS and netCDF files give), or refuse it.
# Happens:  the three store the name of the type without its byte order and the bytes as they lie. What comes back is a float32
#           array of other numbers, and nothing is said; of 1.0, 4.6e-41. pyarrow's sparse tensors read it so as well, while its
#           arrays refuse. safetensors, np.save and h5py bring the numbers back.
# Seen with flax 0.12.8, webdataset 1.0.2, pyarrow 26.0.1, safetensors 0.8.0, h5py 3.16.0, numpy 2.4.6, Python 3.11, on a
# little-endian machine.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 webdataset==1.0.2 pyarrow==26.0.1 safetensors==0.8.0 \
    h5py==3.16.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import flax
import flax.serialization
import h5py
import numpy as np
import pyarrow as pa
import safetensors.numpy
from webdataset import tenbin

array = np.arange(1, 7, dtype=">f4").reshape(2, 3)


def by_numpy():
    np.save("array.npy", array)
    return np.load("array.npy")


def by_h5py():
    with h5py.File("array.h5", "w") as file:
        file["array"] = array
        return file["array"][:]


template = {"w": np.zeros((2, 3), np.float32)}
wrong = {
    "flax msgpack": flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize({"w": array}))["w"],
    "flax to_bytes, from_bytes": flax.serialization.from_bytes(template, flax.serialization.to_bytes({"w": array}))["w"],
    "webdataset tenbin": tenbin.decode_buffer(tenbin.encode_buffer([array]))[0],
    "pyarrow Tensor": pa.Tensor.from_numpy(array).to_numpy(),
    "pyarrow SparseCSRMatrix": pa.SparseCSRMatrix.from_dense_numpy(array).to_tensor().to_numpy(),
}
right = {
    "safetensors": safetensors.numpy.load(safetensors.numpy.save({"w": array}))["w"],
    "np.save": by_numpy(),
    "h5py": by_h5py(),
}
print("flax", flax.__version__, "pyarrow", pa.__version__)
for name, values in (wrong | right).items():
    print(f"{name}: {values.dtype.str} {values.ravel()[:3].tolist()}")
try:
    pa.array(array[0])
except pa.ArrowNotImplementedError as error:
    print("pyarrow array:", error)
else:
    raise AssertionError("this has changed")
assert all((values == array).all() for values in right.values())
assert all(values.shape == array.shape and np.abs(values).max() < 1e-38 for values in wrong.values()), "this has changed"
print("as described")
PY
