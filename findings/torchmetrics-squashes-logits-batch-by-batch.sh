#!/usr/bin/env bash
# Guess:    torchmetrics takes logits, and a metric over an epoch does not depend on how the epoch is cut into batches: the AUROC,
#           which only looks at the order of the scores, and the accuracy are those of all logits together.
# Happens:  a sigmoid is applied to a batch only if one of its values is below 0 or above 1. Logits of a small batch, or of a
#           network whose scores are small, as after pruning or at the start, lie between 0 and 1 now and then: that batch is taken
#           for probabilities and kept as it is, the others are squashed, and the two kinds are ranked and compared with the
#           threshold together. Of 400 good scores the AUROC in batches of four, two and one is lower than in one batch, down to
#           0.89 from 0.95, and the accuracy is another one. A network of which all logits are between 0 and 0.5 has an accuracy of
#           0 where it is right every time. Nothing is said. The multiclass AUROC and calibration error do so with the softmax.
#           Squashed beforehand, all cuts agree.
# Seen with torchmetrics 1.9.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torchmetrics==1.9.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
import torchmetrics
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, MulticlassAUROC, MulticlassCalibrationError

warnings.simplefilter("error")  # a warning would end the script
print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
torch.manual_seed(0)


def over(metric, scores, labels, size):
    for start in range(0, len(scores), size):
        metric.update(scores[start : start + size], labels[start : start + size])
    return round(float(metric.compute()), 4)


labels = torch.randint(0, 2, (400,))
logits = 0.3 + (labels * 2.0 - 1) * 0.6 + torch.randn(400) * 0.5
seen = {}
for name, scores in {"logits": logits, "probabilities": logits.sigmoid()}.items():
    for size in (400, 8, 4, 2, 1):
        seen[name, size] = over(BinaryAUROC(), scores, labels, size), over(BinaryAccuracy(), scores, labels, size)
        print(f"{name} in batches of {size}: AUROC {seen[name, size][0]}, accuracy {seen[name, size][1]}")
assert len({seen["probabilities", size] for size in (400, 8, 4, 2, 1)}) == 1, "this has changed"
assert seen["logits", 400] == seen["probabilities", 400], "this has changed"
assert all(seen["logits", size][0] < seen["logits", 400][0] - 0.01 for size in (2, 1)), "this has changed"
assert all(seen["logits", size] != seen["logits", 400] for size in (4, 2, 1)), "this has changed"
positive = torch.rand(400) * 0.2 + 0.1  # small positive logits: each one says "1", which is the label
ones = torch.ones(400, dtype=torch.long)
small = over(BinaryAccuracy(), positive, ones, 400), over(BinaryAccuracy(), positive.sigmoid(), ones, 400)
print("small positive logits, all right: accuracy", small[0], "and from probabilities", small[1])
assert small == (0, 1), "this has changed"
classes = torch.randint(0, 3, (400,))
scores = 0.4 + torch.randn(400, 3) * 0.4 + torch.nn.functional.one_hot(classes, 3) * 0.4
for make in (MulticlassAUROC, MulticlassCalibrationError):
    for name, given in {"logits": scores, "probabilities": scores.softmax(1)}.items():
        found = [over(make(3), given, classes, size) for size in (400, 1)]
        print(f"{make.__name__} of {name}, one batch and batches of 1: {found}")
        assert (found[0] != found[1]) == (name == "logits"), "this has changed"
print("as described")
PY
