#!/usr/bin/env bash
# Guess:    image.convert("RGB"), which the usual data sets call on whatever they open, scales the 16 bits of a grayscale PNG, an
#           X-ray or a depth map, to 8, as it does those of a colour PNG and as OpenCV does.
# Happens:  a colour PNG's are scaled when it is opened. A grayscale one keeps its numbers, and convert cuts off at 255:
#           everything brighter than 0.4 % of white is white, and the network is trained on white images without a word.
#           convert("L") does the same. cv2.imread scales both.
# Seen with pillow 13.0.0, opencv-python-headless 5.0.0.93, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import warnings

import cv2
import numpy as np
import PIL
from PIL import Image

warnings.simplefilter("error")  # a warning would end the script
gray = np.linspace(0, 65535, 1000).astype(np.uint16).reshape(25, 40)
cv2.imwrite("gray.png", gray)
cv2.imwrite("colour.png", np.stack([gray] * 3, axis=-1))
print("pillow", PIL.__version__, "opencv", cv2.__version__)
expected = gray // 257
seen = {}
for name in ("gray", "colour"):
    with Image.open(f"{name}.png") as image:
        seen[name, "pillow RGB"] = np.asarray(image.convert("RGB"))[..., 0]
        seen[name, "pillow L"] = np.asarray(image.convert("L"))
    seen[name, "opencv"] = cv2.imread(f"{name}.png")[..., 0]
for (name, way), pixels in seen.items():
    print(f"{name}, {way}: mean {pixels.mean():.1f}, share that is 255: {(pixels == 255).mean():.3f}")
for way in ("pillow RGB", "pillow L"):
    cut = seen.pop(("gray", way))
    assert (cut == np.minimum(gray, 255)).all() and (cut == 255).mean() > 0.99, "this has changed"
assert all(np.abs(pixels.astype(int) - expected).max() <= 1 for pixels in seen.values())
print("as described")
PY
