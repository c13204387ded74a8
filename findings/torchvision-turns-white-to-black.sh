#!/usr/bin/env bash
# Guess:    torchvision's to_dtype(scale=True) makes the brightest pixel of one type the brightest of the other: 1.0 becomes 255
#           in uint8 and 65,535 in uint16, from float16 and bfloat16 as from float32, and back. Its transforms of an image in
#           uint16 give what they give of the same image in uint8, and clip what is too bright.
# Happens:  1.0 in float16 or bfloat16 becomes 0 in uint8, and 1.0 in float32 becomes 0 in uint16: the product with 255.999 or
#           65,535.999 is rounded up to 256 or 65,536 and wraps around, so that white is black. In int16 bfloat16's white is the
#           most negative number. White in uint16 is infinite in float16. adjust_hue and adjust_gamma of a uint16 image, which
#           pass through float32, turn its white to black too, and equalize that of a float16 image. resize with bicubic
#           interpolation clips its overshoot in uint8, and in uint16 and int16 lets it wrap: edges have black pixels in their
#           white and white ones in their black. Nothing is said.
# Seen with torchvision 0.29.2, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torchvision==0.29.2' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
import torchvision
import torchvision.transforms.v2.functional as F
from torchvision.transforms import InterpolationMode

warnings.simplefilter("error")  # a warning would end the script
print("torchvision", torchvision.__version__, "torch", torch.__version__)
seen = {}
for source in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    for target in (torch.uint8, torch.uint16, torch.int16):
        white, gray = (
            F.to_dtype(torch.full((3, 2, 2), value, dtype=source), target, scale=True).unique().tolist()
            for value in (1, 0.5)
        )
        seen[source, target] = white[0]
        top = torch.iinfo(target).max
        print(f"{source} to {target}: 1.0 becomes {white[0]}, 0.5 {gray[0]}, of {top}")
        assert 0.45 * top < gray[0] < 0.55 * top, "this has changed"
wrong = {pair for pair, value in seen.items() if value != torch.iinfo(pair[1]).max}
half, brain = torch.float16, torch.bfloat16
assert {(half, torch.uint8), (brain, torch.uint8), (torch.float32, torch.uint16), (brain, torch.int16)} <= wrong, (
    "changed"
)
assert all(seen[pair] <= 0 for pair in wrong), "this has changed"
assert not {(torch.float32, torch.uint8), (torch.float64, torch.uint8), (torch.float64, torch.uint16)} & wrong, (
    "changed"
)
white = {
    "uint8": torch.full((3, 4, 4), 255, dtype=torch.uint8),
    "uint16": torch.full((3, 4, 4), 65535, dtype=torch.uint16),
}
print("uint16 to float16:", F.to_dtype(white["uint16"], half, scale=True).unique().tolist())
assert F.to_dtype(white["uint16"], half, scale=True).isinf().all(), "this has changed"
for name, transform in {
    "adjust_hue": lambda image: F.adjust_hue(image, 0.1),
    "adjust_gamma": lambda image: F.adjust_gamma(image, 2.0),
    "adjust_brightness": lambda image: F.adjust_brightness(image, 1.5),
    "adjust_contrast": lambda image: F.adjust_contrast(image, 1.5),
}.items():
    result = {dtype: transform(image).unique().tolist() for dtype, image in white.items()}
    print(f"{name} of white:", result)
    assert result["uint8"] == [255], "this has changed"
    assert result["uint16"] == ([0] if name in ("adjust_hue", "adjust_gamma") else [65535]), "this has changed"
ramp = torch.linspace(0, 1, 256).reshape(1, 16, 16).expand(3, 16, 16)
print(
    "largest value after equalize of a ramp to 1.0:",
    {d: float(F.equalize(ramp.to(d))[0, -1, -1]) for d in (torch.float32, half)},
)
assert F.equalize(ramp)[0, -1, -1] == 1 and F.equalize(ramp.to(half))[0, -1, -1] == 0, "this has changed"
edge = torch.zeros(3, 8, 8)
edge[:, :, 4:] = 1  # black on the left and white on the right
for dtype, top in {torch.uint8: 255, torch.uint16: 65535, torch.int16: 32767, torch.float32: 1}.items():
    image = (edge * top).to(dtype)
    large = F.resize(image, [8, 32], InterpolationMode.BICUBIC, antialias=True)[0, 0].double() / top
    left, right = large[:13], large[19:]
    print(
        f"bicubic resize in {dtype}: white side from {right.min():.2f} to {right.max():.2f}, black side to {left.max():.2f}"
    )
    wraps = dtype in (torch.uint16, torch.int16)
    assert (right.min() < 0.1) == wraps, "this has changed"
print("as described")
PY
