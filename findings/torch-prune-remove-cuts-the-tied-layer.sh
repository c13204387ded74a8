#!/usr/bin/env bash
# Guess:    prune.remove makes the pruning of a layer permanent and changes nothing that the model computes: an output layer pruned
#           by torch.nn.utils.prune, tied to an embedding that is not, goes on beside the embedding as it was.
# Happens:  while the layer is pruned only its own product is masked and the embedding is dense. remove writes the masked weight into
#           the shared parameter, so that the embedding loses the same half of its weights, the output changes, and nothing is
#           said. Where both are pruned by masks of their own, removing one prunes the other by both masks. A mask that is a
#           parametrization does the same in remove_parametrizations.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

warnings.simplefilter("error")  # a warning would end the script
torch.manual_seed(0)
tokens = torch.arange(50)


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def density(weight):
    return round(float((weight != 0).float().mean()), 2)


def facts(begin, end):
    """Densities that the embedding computes with, before and after; and whether the output stays."""
    model = Tied()
    begin(model)
    before, embedded = model(tokens), density(model.embedding(tokens))
    end(model)
    return embedded, density(model.embedding(tokens)), torch.allclose(model(tokens), before, atol=1e-4)


def parametrized(model):
    mask = (torch.rand(50, 16) < 0.5).float()
    parametrize.register_parametrization(model.head, "weight", Masked(mask))


def both(model):
    prune.random_unstructured(model.head, "weight", 0.5)
    prune.random_unstructured(model.embedding, "weight", 0.5)


seen = {
    "head pruned, prune.remove": facts(
        lambda model: prune.l1_unstructured(model.head, "weight", 0.5), lambda model: prune.remove(model.head, "weight")
    ),
    "both pruned, prune.remove of the head": facts(both, lambda model: prune.remove(model.head, "weight")),
    "head parametrized, remove_parametrizations": facts(
        parametrized, lambda model: parametrize.remove_parametrizations(model.head, "weight")
    ),
}
print("torch", torch.__version__)
for name, (before, after, same) in seen.items():
    print(f"{name}: the embedding's density {before}, after it {after}; output the same: {same}")
for (before, after, same), (dense, less) in zip(seen.values(), ((1, 0.5), (0.5, 0.25), (1, 0.5)), strict=True):
    assert abs(before - dense) < 0.05 and abs(after - less) < 0.07 and not same, "this has changed"
print("as described")
PY
