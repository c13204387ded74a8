#!/usr/bin/env bash
# Guess:    numcodecs' Delta filter, which is not among the lossy ones (Quantize, BitRound, FixedScaleOffset), gives back the array
#           it was given; in any case zeros stay zeros.
# Happens:  for floats the differences are rounded, and decoding adds all of them up: each value comes back with the sum of the
#           errors before it. Of a pruned weight, nine tenths zeros, some 3 % of the numbers are zero afterwards, the absent edges
#           being something like 1e-8; in float16 a fifth, and errors of 4e-4. Nothing is said. Integers come back exactly, and the
#           lossy filters named above keep zeros, save FixedScaleOffset. The filter is read from a zarr array's metadata and undone
#           by whoever opens it, without a word.
# Seen with numcodecs 0.16.6, zarr 3.1.6 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numcodecs==0.16.6 zarr==3.1.6 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numcodecs
import numpy as np
import zarr

generator = np.random.default_rng(0)
weight = (generator.standard_normal(16384) * 0.05).astype(np.float32)
weight[np.abs(weight) < np.quantile(np.abs(weight), 0.9)] = 0
print("numcodecs", numcodecs.__version__, "zarr", zarr.__version__, "zeros:", round(float((weight == 0).mean()), 3))


def through(codec, values):
    return codec.decode(codec.encode(values)).astype(values.dtype)


for dtype in ("f4", "f2"):
    values = weight.astype(dtype)
    back = through(numcodecs.Delta(dtype=dtype), values)
    zeros, error = float((back == 0).mean()), np.abs(back.astype("f8") - values).max()
    print(f"Delta, {dtype}: zeros {zeros:.3f}, largest error {error:.1e}")
    assert zeros < 0.25, "this has changed"
for dtype in ("i1", "i4"):
    values = (weight * 500).astype(dtype)
    assert np.array_equal(through(numcodecs.Delta(dtype=dtype), values), values), "this has changed"
print("Delta, integers: exact")
scale = {"offset": float(weight.min()), "scale": 255 / float(np.ptp(weight))}
others = {
    "Quantize": numcodecs.Quantize(3, "f4"),
    "BitRound": numcodecs.BitRound(8),
    "FixedScaleOffset": numcodecs.FixedScaleOffset(**scale, dtype="f4", astype="u1"),
}
for name, codec in others.items():
    zeros = float((through(codec, weight) == 0).mean())
    print(f"{name}: zeros {zeros:.3f}")
    assert zeros == 0 if name == "FixedScaleOffset" else zeros == (weight == 0).mean(), "this has changed"
store = zarr.storage.MemoryStore()
options = {"shape": weight.shape, "dtype": "f4", "zarr_format": 2, "filters": [numcodecs.Delta(dtype="f4")]}
zarr.create_array(store, **options)[:] = weight
back = zarr.open_array(store, mode="r")[:]
print("zarr with Delta: zeros", round(float((back == 0).mean()), 3))
assert (back == 0).mean() < 0.2, "this has changed"
print("as described")
PY
