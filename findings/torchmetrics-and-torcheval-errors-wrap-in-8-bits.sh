#!/usr/bin/env bash
# Guess:    the mean squared and mean absolute error of torchmetrics and torcheval are right for images in uint8 and quantized
#           weights in int8, or refuse them: torchmetrics' peak_signal_noise_ratio takes such images and is right. A squared
#           error is not below zero.
# Happens:  the difference and its square are taken in 8 bits and wrap around. Of images in uint8 torchmetrics' squared error is
#           about 106 where it is 11,000; of weights in int8 both libraries give a negative mean squared error. The absolute
#           error, the explained variance, the relative errors and the total variation of an image are off too. torcheval's
#           peak_signal_noise_ratio of two images is -20 dB instead of 8, its r2_score of noise is 1.0: a perfect fit, or
#           better. Identical images have errors of 0 and hide it. Nothing is said. float() beforehand gives the right numbers.
# Seen with torchmetrics 1.9.0, torcheval 0.0.7, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torchmetrics==1.9.0' 'torcheval==0.0.7' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings
from importlib.metadata import version

import torch
import torcheval.metrics.functional as torcheval
from torchmetrics.functional import image as torchmetrics_image
from torchmetrics.functional import regression as torchmetrics

warnings.simplefilter("error")  # a warning would end the script
print("torchmetrics", version("torchmetrics"), "torcheval", version("torcheval"), "torch", torch.__version__)
torch.manual_seed(0)
images = [torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8) for _ in range(2)]
weights = [torch.randint(-127, 128, (64, 64), dtype=torch.int8) for _ in range(2)]


def both(metric, arrays, **options):
    """The metric of 8-bit arrays as they are and as floats."""
    return tuple(round(float(metric(*given, **options)), 2) for given in (arrays, [array.float() for array in arrays]))


flat = {"uint8": [image.flatten() for image in images], "int8": [weight.flatten() for weight in weights]}
seen = {}
for kind, arrays in flat.items():
    for name, metric in {
        "torchmetrics squared error": torchmetrics.mean_squared_error,
        "torchmetrics absolute error": torchmetrics.mean_absolute_error,
        "torchmetrics explained variance": torchmetrics.explained_variance,
        "torchmetrics weighted relative error": torchmetrics.weighted_mean_absolute_percentage_error,
        "torcheval squared error": torcheval.mean_squared_error,
        "torcheval r2": torcheval.r2_score,
    }.items():
        seen[kind, name] = both(metric, arrays)
seen["uint8", "torchmetrics total variation"] = both(torchmetrics_image.total_variation, images[:1])
seen["uint8", "torcheval PSNR"] = both(torcheval.peak_signal_noise_ratio, images)
right = both(torchmetrics_image.peak_signal_noise_ratio, images, data_range=255.0)
for (kind, name), (found, expected) in seen.items():
    print(f"{name} of {kind}: {found}, of the same numbers as floats: {expected}")
    assert abs(found - expected) > 0.2 * abs(expected), "this has changed"
print("torchmetrics PSNR of uint8:", right)
assert right[0] == right[1], "this has changed"
assert all(seen["int8", f"{library} squared error"][0] < 0 for library in ("torchmetrics", "torcheval")), (
    "this has changed"
)
assert seen["uint8", "torcheval PSNR"][0] < 0 < seen["uint8", "torcheval PSNR"][1], "this has changed"
assert seen["uint8", "torcheval r2"][0] > 0.95 and seen["uint8", "torcheval r2"][1] < 0, "this has changed"
print("as described")
PY
