#!/usr/bin/env bash
# Guess:    the pixels of a 16-bit grayscale TIFF are the same numbers whichever way they are read: np.asarray of Pillow's image,
#           given to OpenCV, is what OpenCV and tifffile read from the file themselves.
# Happens:  of a big-endian file ("MM") Pillow makes an array of dtype ">u2", right to numpy, and OpenCV looks at its size and
#           kind and not at its byte order: it resizes, adds and writes each value with its two bytes exchanged, and nothing is
#           said. A value of 100 is 25600. cv2.imread and tifffile give arrays in the machine's order. `.astype(np.uint16)` mends
#           it.
# Seen with pillow 13.0.0, opencv-python-headless 5.0.0.93, tifffile 2026.3.3, numpy 2.4.6, Python 3.11, on a little-endian
# machine.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 opencv-python-headless==5.0.0.93 tifffile==2026.3.3 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import cv2
import numpy as np
import PIL
import tifffile
from PIL import Image

values = np.array([[100, 200, 300], [400, 500, 600]], np.uint16)
swapped = values.byteswap()
tifffile.imwrite("big.tif", values, byteorder=">")
own = {"cv2.imread": cv2.imread("big.tif", cv2.IMREAD_UNCHANGED), "tifffile": tifffile.imread("big.tif")}
by_pillow = np.asarray(Image.open("big.tif"))
print("pillow", PIL.__version__, "opencv", cv2.__version__, "dtype by Pillow:", by_pillow.dtype.str)
assert by_pillow.dtype.str == ">u2" and (by_pillow == values).all(), "this has changed"
cv2.imwrite("out.png", by_pillow)
seen = {
    "resize to the same size": cv2.resize(by_pillow, (3, 2), interpolation=cv2.INTER_NEAREST),
    "add": cv2.add(by_pillow, np.zeros_like(values)),
    "imwrite and imread": cv2.imread("out.png", cv2.IMREAD_UNCHANGED),
}
for name, pixels in (own | seen).items():
    print(f"{name}: {pixels.ravel().tolist()}")
assert all((pixels == values).all() for pixels in own.values())
assert all((pixels == swapped).all() for pixels in seen.values()), "this has changed"
assert (cv2.add(by_pillow.astype(np.uint16), np.zeros_like(values)) == values).all()
print("as described")
PY
