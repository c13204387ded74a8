#!/usr/bin/env bash
# Guess:    torch.ao.pruning.WeightNormSparsifier with blocks of (1, 4), two zeros in each and sparsity_level=0.5 makes a
#           2:4 weight: two zeros in every block. And it prunes convolutions, for which its code has a branch.
# Happens:  sparsity_level is the share of blocks that get their two zeros: half of the blocks stay dense, a quarter of
#           the weight is zero. A convolution's weight raises a RuntimeError in step(), whatever the block.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier


def zeros_after_a_step(layer, level, block, zeros):
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    sparsifier = WeightNormSparsifier(sparsity_level=level, sparse_block_shape=block, zeros_per_block=zeros)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    try:
        sparsifier.step()
    except RuntimeError as error:
        return f"RuntimeError: {str(error)[:60]}"
    return (model[0].weight == 0).reshape(-1, 4).sum(1).tolist()


by_level = {level: zeros_after_a_step(nn.Linear(16, 8), level, (1, 4), 2) for level in (0.5, 1.0)}
for level, zeros in by_level.items():
    print(f"sparsity_level={level}: zeros in each block of four {zeros}")
convolutions = {
    block: zeros_after_a_step(nn.Conv2d(16, 8, 3), 0.5, block, zeros) for block, zeros in (((1, 1), 1), ((1, 4), 4))
}
for block, found in convolutions.items():
    print(f"Conv2d, blocks of {block}: {found}")
assert sorted(by_level[0.5]) == [0] * 16 + [2] * 16, "this has changed"
assert by_level[1.0] == [2] * 32, "this has changed"
assert all(str(found).startswith("RuntimeError") for found in convolutions.values()), "this has changed"
print("as described")
PY
