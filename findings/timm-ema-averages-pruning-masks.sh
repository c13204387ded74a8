#!/usr/bin/env bash
# Guess:    in the moving average of a network pruned by torch.nn.utils.prune, masks stay masks of zeros and ones.
# Happens:  the masks are buffers of floats, and timm's ModelEmaV3 averages them with the weights: when the masks of the
#           network change, those of the average become fractions, and what it computes with is the product of an
#           averaged weight and an averaged mask. torch's AveragedModel does so with use_buffers=True only.
# Seen with torch 2.15.0, timm 1.0.31 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torchvision==0.29.2' 'timm==1.0.31' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import copy

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8, bias=False))
with torch.no_grad():
    prune.random_unstructured(model[0], "weight", 0.5)


def masks_after_a_change(average_of):
    own = copy.deepcopy(model)
    average, update = average_of(own)
    update(own)
    own[0].weight_mask.copy_(1 - own[0].weight_mask)  # every edge dropped, every other one grown
    update(own)
    return sorted({round(value, 6) for value in average.module[0].weight_mask.flatten().tolist()})


def timm_average(own):
    average = ModelEmaV3(own, decay=0.9)
    return average, average.update


def torch_average(own, buffers):
    average = AveragedModel(own, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    return average, average.update_parameters


seen = {
    "timm ModelEmaV3": masks_after_a_change(timm_average),
    "torch AveragedModel": masks_after_a_change(lambda own: torch_average(own, buffers=False)),
    "torch AveragedModel, use_buffers=True": masks_after_a_change(lambda own: torch_average(own, buffers=True)),
}
for name, values in seen.items():
    print(f"{name}: the mask holds {values}")
assert list(seen.values()) == [[0.1, 0.9], [0.0, 1.0], [0.1, 0.9]], "this has changed"
print("as described")
PY
