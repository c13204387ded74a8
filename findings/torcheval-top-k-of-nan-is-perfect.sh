#!/usr/bin/env bash
# Guess:    the top-5 accuracy, the hit rate and the reciprocal rank of a network whose outputs are all NaN, as after a step
#           that diverged, are about chance in torcheval, or zero, or NaN, as its loss is; those of one that gives all classes
#           the same score, as an output layer that is pruned away does, are chance.
# Happens:  all are perfect. The rank of the right class is the number of classes with a larger score, and neither an equal
#           score nor NaN is larger: with k of two or more the accuracy is 1.0, the hit rate and the reciprocal rank are 1.0 for
#           every sample, and the best checkpoint by them is a broken one. With k=1 the accuracy, by argmax, is that of the
#           first class. Classes that tie in float16 or bfloat16 count as hits too. torchmetrics' top-5 accuracy of the same
#           outputs is about chance.
# Seen with torcheval 0.0.7, torchmetrics 1.9.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torcheval==0.0.7' 'torchmetrics==1.9.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings
from importlib.metadata import version

import torch
from torcheval.metrics import HitRate, MulticlassAccuracy, ReciprocalRank
from torchmetrics.classification import MulticlassAccuracy as TorchmetricsAccuracy

warnings.simplefilter("error")  # a warning would end the script
print("torcheval", version("torcheval"), "torchmetrics", version("torchmetrics"), "torch", torch.__version__)
torch.manual_seed(0)
classes, samples = 100, 5000
labels = torch.randint(classes, (samples,))
scores = torch.randn(samples, classes)
outputs = {
    "random": scores,
    "random, all within 1 +- 0.01, bfloat16": (1 + scores / 400).bfloat16(),
    "all equal": torch.zeros(samples, classes),
    "all NaN": torch.full((samples, classes), float("nan")),
}
seen = {}
for name, given in outputs.items():
    found = {
        "top-1": MulticlassAccuracy(num_classes=classes),
        "top-2": MulticlassAccuracy(num_classes=classes, k=2),
        "top-5": MulticlassAccuracy(num_classes=classes, k=5),
        "hit rate 5": HitRate(k=5),
        "reciprocal rank": ReciprocalRank(),
        "torchmetrics top-5": TorchmetricsAccuracy(classes, top_k=5, average="micro"),
    }
    for metric in found.values():
        metric.update(given, labels)
    seen[name] = {key: round(float(metric.compute().float().mean()), 3) for key, metric in found.items()}
    print(f"{name}: {seen[name]}")
perfect = ("top-2", "top-5", "hit rate 5", "reciprocal rank")
assert all(seen["random"][key] < 0.07 for key in seen["random"]), "this has changed"
assert all(seen[name][key] == 1 for name in ("all equal", "all NaN") for key in perfect), "this has changed"
assert all(seen[name]["torchmetrics top-5"] < 0.1 and seen[name]["top-1"] < 0.03 for name in outputs), (
    "this has changed"
)
tied = seen["random, all within 1 +- 0.01, bfloat16"]
assert tied["top-5"] > 3 * seen["random"]["top-5"], "this has changed"
print("as described")
PY
