#!/usr/bin/env bash
# Guess:    torchao's WandaSparsifier prunes as the paper that it cites: each output compares its own inputs, so that at
#           sparsity_level=0.5 each row of the weight loses half of its entries, whatever the row's size.
# Happens:  the scores of the whole layer are ranked together. Where the rows of a weight differ in size, the small ones are
#           removed: of eight outputs with 64 inputs each the smallest keeps one input and the largest 51. Per-output pruning is
#           what the method is about; with semi_structured_block_size=4 it comes back, in blocks of four.
# Seen with torchao 0.18.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torchao==0.18.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
from torch import nn

warnings.filterwarnings("ignore")
import torchao
from torchao.sparsity import WandaSparsifier


def kept(**options):
    """How many of its 64 inputs each output keeps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(8, 64) * torch.arange(1.0, 9.0)[:, None])
    sparsifier = WandaSparsifier(**options)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    model(torch.randn(256, 64))
    sparsifier.step()
    return (model[0].weight != 0).sum(1).tolist()


print("torchao", torchao.__version__)
layer = kept(sparsity_level=0.5)
blocks = kept(sparsity_level=0.5, semi_structured_block_size=4)
print("sparsity_level=0.5: inputs kept by each output", layer)
print("with blocks of four:", blocks)
assert sum(layer) == 256 and min(layer) < 10 and max(layer) > 44, "this has changed"
assert blocks == [32] * 8, "this has changed"
print("as described")
PY
