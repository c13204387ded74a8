#!/usr/bin/env bash
# Guess:    a mask of booleans that tifffile writes is the same mask in Pillow and OpenCV: True is 1 or 255.
# Happens:  it is the inverse. tifffile writes booleans with 0 standing for white and does not look at that when it reads; Pillow
#           and OpenCV exchange black and white, as the file says. Where tifffile, and imageio, which reads TIFF with it, have
#           True, they have False: foreground and background, kept and pruned, change places, and nothing is said. A file of 8
#           bits that says so, as scanners write them, is read as its inverse by one pair or the other, too. uint8 masks are the
#           same in all.
# Seen with tifffile 2026.3.3, pillow 13.0.0, opencv-python-headless 5.0.0.93, imageio 2.38.1, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tifffile==2026.3.3 pillow==13.0.0 opencv-python-headless==5.0.0.93 \
    imageio==2.38.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import cv2
import imageio.v3
import numpy as np
import PIL
import tifffile
from PIL import Image

readers = {
    "tifffile": tifffile.imread,
    "imageio": imageio.v3.imread,
    "pillow": lambda path: np.asarray(Image.open(path)),
    "opencv": lambda path: cv2.imread(path, cv2.IMREAD_UNCHANGED),
}
print("tifffile", tifffile.__version__, "pillow", PIL.__version__, "opencv", cv2.__version__)
mask = np.array([[True, True, True, False]])
cases = {
    "booleans": (mask, {}),
    "8 bits, 0 is white": (mask.astype(np.uint8) * 255, {"photometric": "miniswhite"}),
    "8 bits": (mask.astype(np.uint8) * 255, {}),
}
for name, (values, options) in cases.items():
    tifffile.imwrite("mask.tif", values, **options)
    seen = {reader: (read("mask.tif") > 0).tolist() for reader, read in readers.items()}
    print(f"{name}: {seen}")
    assert seen["tifffile"] == seen["imageio"] == mask.tolist()
    other = mask if name == "8 bits" else ~mask
    assert seen["pillow"] == seen["opencv"] == other.tolist(), "this has changed"
print("as described")
PY
