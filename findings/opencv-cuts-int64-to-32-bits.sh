#!/usr/bin/env bash
# Guess:    OpenCV 5, which has 64-bit integers among its types, computes with a numpy array of int64, numpy's default, or raises
#           for one, as it does for bool and as resize does for uint32.
# Happens:  the array is cast to int32 on the way in: of 2^40 + 5 is left 5, of 3,000,000,000 a negative number. resize, flip,
#           rotate and add give other numbers of type int32, minMaxLoc does not find the largest, and compare says that 2^40 + 5
#           is not greater than 2^32 + 6. Ids, offsets and sums kept in int64 are lost without a word.
# Seen with opencv-python-headless 5.0.0.93, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet opencv-python-headless==5.0.0.93 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import cv2
import numpy as np

warnings.simplefilter("error")  # a warning would end the script
values = np.array([[2**40 + 5, 3_000_000_000, 7]])
assert values.dtype == np.int64
print("opencv", cv2.__version__, "values:", values.ravel().tolist())
seen = {
    "resize to the same size": cv2.resize(values, (3, 1), interpolation=cv2.INTER_NEAREST),
    "flip twice": cv2.flip(cv2.flip(values, 1), 1),
    "rotate twice": cv2.rotate(cv2.rotate(values, cv2.ROTATE_180), cv2.ROTATE_180),
    "add nothing": cv2.add(values, np.zeros_like(values)),
}
for name, result in seen.items():
    print(f"{name}: {result.dtype} {result.ravel().tolist()}")
largest = cv2.minMaxLoc(values)[1]
greater = cv2.compare(values, np.full_like(values, 2**32 + 6), cv2.CMP_GT).ravel().tolist()
print("minMaxLoc: largest", largest, "; compare with 2^32 + 6:", greater)
assert all((result == values.astype(np.int32)).all() and result.dtype == np.int32 for result in seen.values()), "changed"
assert largest == 7 and greater[0] == 0, "this has changed"
for dtype, call in {np.uint32: lambda array: cv2.resize(array, (6, 1)), bool: lambda array: cv2.add(array, array)}.items():
    try:
        call(values.astype(dtype))
    except cv2.error as error:
        print(f"{np.dtype(dtype)} raises:", str(error).splitlines()[0][-60:])
    else:
        raise AssertionError("this has changed")
print("as described")
PY
