#!/usr/bin/env bash
# Guess:    SoftCrossEntropyLoss(smooth_factor=0, ignore_index=255) of segmentation_models_pytorch is torch's cross_entropy with
#           ignore_index=255: the mean over the pixels that count, however many are left out.
# Happens:  ignored pixels have a loss of zero and are counted in the mean: with nine tenths of the pixels unlabelled the loss
#           and its gradient are a tenth of torch's, so that images with few labels count little and the learning rate depends
#           on how much is labelled. It is so with smoothing and without. The library's FocalLoss divides by the pixels that
#           count, and is NaN where there are none. Without ignored pixels SoftCrossEntropyLoss is torch's. Nothing is said.
# Seen with segmentation_models_pytorch 0.6.0, timm 1.0.31, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torchvision==0.29.2' 'timm==1.0.31' \
    'segmentation_models_pytorch==0.6.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings
from importlib.metadata import version

import torch
import torch.nn.functional as F

warnings.simplefilter("ignore")
from segmentation_models_pytorch.losses import FocalLoss, SoftCrossEntropyLoss  # noqa: E402

warnings.simplefilter("error")  # a warning would end the script
print("segmentation_models_pytorch", version("segmentation_models_pytorch"), "torch", torch.__version__)
torch.manual_seed(0)
logits, labels = torch.randn(2, 5, 64, 64), torch.randint(0, 5, (2, 64, 64))


def loss_and_gradient(loss, labels):
    given = logits.clone().requires_grad_()
    value = loss(given, labels)
    return float(value.detach()), float(torch.autograd.grad(value, given)[0].norm())


for ignored in (0.0, 0.5, 0.9, 0.99):
    some = torch.where(torch.rand(labels.shape) < ignored, 255, labels)
    kept = float((some != 255).double().mean())
    for smoothing in (0.0, 0.1):
        soft = loss_and_gradient(SoftCrossEntropyLoss(smooth_factor=smoothing, ignore_index=255), some)
        plain = loss_and_gradient(lambda x, y: F.cross_entropy(x, y, ignore_index=255, label_smoothing=smoothing), some)
        shares = f"loss {soft[0]:.3f}, torch {plain[0]:.3f}; gradient {soft[1] / plain[1]:.3f} of torch's"
        print(f"{ignored:.0%} ignored, smoothing {smoothing}: {shares}")
        assert all(abs(a / b / kept - 1) < 0.03 for a, b in zip(soft, plain, strict=True)), "this has changed"
    focal = loss_and_gradient(FocalLoss("multiclass", ignore_index=255), some)[0]
    print(f"  FocalLoss {focal:.3f}")
    assert 0.2 < focal < 0.6, "this has changed"
none = float(FocalLoss("multiclass", ignore_index=255)(logits, torch.full_like(labels, 255)))
print("FocalLoss with all pixels ignored:", none)
assert none != none, "this has changed"
print("as described")
PY
