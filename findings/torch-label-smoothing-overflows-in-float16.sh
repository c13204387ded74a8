#!/usr/bin/env bash
# Guess:    cross_entropy(logits, target, label_smoothing=0.1) in float16 is as good as without label smoothing: with logits of
#           ordinary size both losses are of the size of the logarithm of the number of classes, about 10.
# Happens:  the log-probabilities of all classes and of the whole batch are added up in float16 before anything is divided, and
#           the sum is past 65,504 soon: for a vocabulary of 32,000 with a single token, for 1,000 classes with a batch of 32,
#           not with 4. The loss is infinite, for every input, from the first step on; the gradients are finite and right, so
#           the training itself is sound where nothing looks at the loss, and a check for infinite losses or a schedule by the
#           loss stops it. The same smoothing written out, probabilities as targets, is finite, and so is bfloat16.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
import torch.nn.functional as F

warnings.simplefilter("error")  # a warning would end the script
torch.manual_seed(0)
print("torch", torch.__version__)


def loss_of(logits, target, **options):
    logits = logits.clone().requires_grad_()
    loss = F.cross_entropy(logits, target, **options)
    return float(loss.detach()), torch.autograd.grad(loss, logits)[0].float()


for samples, classes in ((1, 32000), (4, 32000), (32, 1000)):
    logits, target = torch.randn(samples, classes), torch.randint(classes, (samples,))
    seen, gradients = {}, {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for smoothing in (0.0, 0.1):
            seen[dtype, smoothing], gradients[dtype, smoothing] = loss_of(
                logits.to(dtype), target, label_smoothing=smoothing
            )
    print(f"{samples} samples, {classes} classes:", {f"{str(d)[6:]}, {s}": round(v, 2) for (d, s), v in seen.items()})
    infinite = {key for key, value in seen.items() if value == float("inf")}
    assert infinite == {(torch.float16, 0.1)}, "this has changed"
    smooth, right = gradients[torch.float16, 0.1], gradients[torch.float32, 0.1]
    error = float((smooth - right).norm() / right.norm())
    print(f"  relative error of the gradient: {error:.4f}")
    assert error < 0.02, "this has changed"
    half = logits.half()
    each = F.cross_entropy(half, target, label_smoothing=0.1, reduction="none")
    soft = F.one_hot(target, classes).half() * 0.9 + 0.1 / classes
    written = F.cross_entropy(half, soft)
    print(
        f"  reduction='none': {int(each.isfinite().sum())} finite; written out as probabilities: {float(written):.2f}"
    )
    assert abs(float(written) - seen[torch.float32, 0.1]) < 0.2, "this has changed"
few = F.cross_entropy(torch.randn(4, 1000).half(), torch.arange(4), label_smoothing=0.1)
print("4 samples, 1000 classes, float16:", round(float(few), 2))
assert few.isfinite(), "this has changed"
print("as described")
PY
