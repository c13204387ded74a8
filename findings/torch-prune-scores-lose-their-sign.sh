#!/usr/bin/env bash
# Guess:    the importance_scores that torch.nn.utils.prune takes are ranked as they are: "the values in this tensor indicate the
#           importance", so the entries with the lowest scores are removed, and a negative score is less than zero.
# Happens:  l1_unstructured, and global_unstructured with L1Unstructured, rank their absolute values. Of scores with a sign, those of
#           movement pruning or of a Taylor expansion, where a negative one says that the loss falls without the weight, the most
#           negative are kept and the ones around zero removed. ln_structured sums their sizes alike. In a layer that is one half
#           exact and one half wrong, pruning the wrong half by its scores leaves the wrong half.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11: scores have to be made positive first, by a shift, say.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
from torch import nn
from torch.nn.utils import prune

warnings.simplefilter("error")  # a warning would end the script
torch.manual_seed(0)
x = torch.linalg.qr(torch.randn(500, 8))[0] * 500**0.5  # inputs of variance one that do not correlate
truth = torch.tensor([[1.0, -1.2, 0.8, -0.9, 1.1, -1.0, 0.7, 1.3]])
harm = torch.arange(8) >= 4  # these inputs have the wrong sign in the layer that is to be pruned
start = torch.where(harm, -2 * truth, truth)
target = nn.functional.linear(x, torch.where(harm, 0 * truth, truth))


def layer():
    linear = nn.Linear(8, 1, bias=False)
    linear.weight.data.copy_(start)
    return linear


def loss_of(linear):
    return float(((linear(x) - target) ** 2).mean().detach())


# What the loss would rise by without each weight, measured: below zero for the wrong ones.
scores = torch.zeros(1, 8)
for index in range(8):
    without = layer()
    without.weight.data[0, index] = 0
    scores[0, index] = loss_of(without) - loss_of(layer())


def local(given):
    return prune.l1_unstructured(layer(), "weight", 4, importance_scores=given)


def over_all(given):
    linear = layer()
    where = [(linear, "weight")]
    prune.global_unstructured(where, prune.L1Unstructured, importance_scores={where[0]: given}, amount=4)
    return linear


def structured(given):
    return prune.ln_structured(layer(), "weight", 4, n=1, dim=1, importance_scores=given)


print("torch", torch.__version__)
print("scores:", [round(value, 1) for value in scores[0].tolist()], "loss before", round(loss_of(layer()), 2))
for act in (local, over_all, structured):
    signed, shifted = act(scores), act(scores - scores.min())
    wrong_left = int(signed.weight_mask[0, harm].sum()), int(shifted.weight_mask[0, harm].sum())
    losses = round(loss_of(signed), 2), round(loss_of(shifted), 2)
    print(f"{act.__name__}: wrong weights kept {wrong_left[0]}, loss {losses[0]}; with shifted scores {wrong_left[1]}, {losses[1]}")
    assert wrong_left == (4, 0) and losses[0] > 20 and losses[1] < 1e-6, "this has changed"
print("as described")
PY
