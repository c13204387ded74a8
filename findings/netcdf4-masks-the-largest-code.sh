#!/usr/bin/env bash
# Guess:    small integers that are written to a netCDF file without a fill value are all there when they are read: quantized
#           weights from -127 to 127 in int8, and images in uint8, have no value to spare, and netCDF's own rules except bytes from
#           fill values.
# Happens:  netCDF4 takes -127 of int8, 255 of uint8 and -32767 of int16 for missing and returns a masked array. Symmetric
#           quantization puts the largest weight of each layer at the end of its range: where it is negative it is left out of the
#           mean, of the largest absolute value and of whatever else numpy.ma computes, and filled(0) prunes it. White pixels are
#           left out of an image's mean. Nothing is said. int8's -128, which no symmetric weight has, is there. A variable made
#           with fill_value=False gives all values of int8 and uint8, but not of int16; set_auto_mask(False) at reading gives all,
#           and so does xarray, which asks for no masks.
# Seen with netCDF4 1.7.5.1.post1, xarray 2026.9.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet netCDF4==1.7.5.1.post1 xarray==2026.9.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/file.nc" <<'PY'
import sys

import netCDF4
import numpy as np
import xarray

file = sys.argv[1]
weight = np.array([0.1, -0.7, 0.3, 0.0, 0.5])
arrays = {
    "int8": np.round(weight / np.abs(weight).max() * 127).astype(np.int8),
    "int16": np.round(weight / np.abs(weight).max() * 32767).astype(np.int16),
    "uint8": np.array([255, 0, 128, 255, 255], np.uint8),
}
with netCDF4.Dataset(file, "w") as dataset:
    dataset.createDimension("n", 5)
    for name, array in arrays.items():
        dataset.createVariable(name, array.dtype, ("n",))[:] = array
        dataset.createVariable(name + "_no_fill", array.dtype, ("n",), fill_value=False)[:] = array
    dataset.createVariable("lowest", "i1", ("n",))[:] = np.full(5, -128, np.int8)
print("netCDF4", netCDF4.__version__, "xarray", xarray.__version__)
with netCDF4.Dataset(file) as dataset:
    for name, array in arrays.items():
        read, whole = dataset[name][:], dataset[name + "_no_fill"][:]
        print(f"{name}: wrote {array.tolist()}, read {read.tolist()}, filled {read.filled(0).tolist()},", end=" ")
        print("mean", float(read.mean()), "of", float(array.mean()), "without fill", whole.tolist())
        assert np.ma.getmaskarray(read).sum() == (3 if name == "uint8" else 1), "this has changed"
        assert read.mean() != array.mean() and (whole.tolist() == array.tolist()) == (name != "int16"), "this has changed"
    largest = int(np.abs(dataset["int8"][:].astype(int)).max())
    print("largest absolute value of the int8 weight:", largest)
    assert largest == 91 and dataset["lowest"][:].tolist() == [-128] * 5, "this has changed"
    dataset.set_auto_mask(False)
    assert all(dataset[name][:].tolist() == array.tolist() for name, array in arrays.items()), "this has changed"
with xarray.open_dataset(file) as dataset:
    print("xarray:", {name: dataset[name].values.tolist() for name in arrays})
    assert all(dataset[name].values.tolist() == array.tolist() for name, array in arrays.items()), "this has changed"
print("as described")
PY
