#!/usr/bin/env bash
# Guess:    torch_geometric's std and var of a node's neighbours ("std" and "var" as aggr, as in PNA) are those of torch.std and
#           torch.var to a few digits of float32, whatever the mean of the feature is.
# Happens:  the variance is the mean of the squares less the square of the mean, in float32. Where the mean is a thousand times
#           the spread, as of a year, a coordinate or a count, one std in seven is off by a tenth; at ten thousand times all
#           are, more than half are 0 and have no gradient, and there are negative variances. In bfloat16 a mean of twenty times
#           the spread is enough. Nothing is said. torch.std of the same numbers is right, and so is the aggregation where the
#           mean is subtracted from the features before, and in float64.
# Seen with torch_geometric 2.8.1, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torch_geometric==2.8.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
import torch_geometric
from torch_geometric.nn.aggr import StdAggregation, VarAggregation

warnings.simplefilter("error")  # a warning would end the script
print("torch_geometric", torch_geometric.__version__, "torch", torch.__version__)
torch.manual_seed(0)
nodes, neighbours = 1000, 8
spread = torch.randn(nodes, neighbours, dtype=torch.float64)
index = torch.arange(nodes).repeat_interleave(neighbours)


def look(mean, dtype):
    """Share of nodes with a std of zero, and with one that is off by more than a tenth."""
    features = (spread + mean).to(dtype)
    right = features.double().std(1, correction=0)
    found = StdAggregation()(features.reshape(-1, 1), index).reshape(-1).double()
    by_torch = features.std(1, correction=0).double()
    shares = found == 0, (found / right - 1).abs() > 0.1, (by_torch / right - 1).abs() > 0.1
    return [float(share.double().mean()) for share in shares]


seen = {}
for dtype, means in {torch.float32: (0, 100, 1e3, 1e4, 1e5), torch.float64: (0, 1e4), torch.bfloat16: (0, 20)}.items():
    for mean in means:
        seen[dtype, mean] = look(mean, dtype)
        zero, off, torch_off = seen[dtype, mean]
        print(
            f"{dtype}, mean {mean:g}, spread 1: std is 0 for {zero:.0%}, off by a tenth for {off:.0%}, torch.std {torch_off:.0%}"
        )
assert seen[torch.float32, 0][1] == seen[torch.float64, 1e4][1] == 0, "this has changed"
assert seen[torch.float32, 1e4][1] > 0.9 and seen[torch.float32, 1e4][0] > 0.3, "this has changed"
assert seen[torch.bfloat16, 20][1] > 0.5 and seen[torch.float32, 1e3][1] > 0.02, "this has changed"
assert all(torch_off < 0.01 for (dtype, _), (_, _, torch_off) in seen.items() if dtype != torch.bfloat16), (
    "this has changed"
)
features = (spread + 1e4).float().reshape(-1, 1).requires_grad_()
gradient = torch.autograd.grad(StdAggregation()(features, index).sum(), features)[0].reshape(nodes, neighbours)
print(f"nodes without a gradient at mean 1e4: {float((gradient == 0).all(1).double().mean()):.0%}")
assert (gradient == 0).all(1).double().mean() > 0.3, "this has changed"
variance = VarAggregation()(features.detach(), index)
print(f"variances at mean 1e4: from {float(variance.min())} to {float(variance.max())}")
assert variance.min() < 0, "this has changed"
print("as described")
PY
