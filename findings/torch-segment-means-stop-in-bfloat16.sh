#!/usr/bin/env bash
# Guess:    torch.segment_reduce and Tensor.index_reduce_, the reductions for graphs and ragged batches, keep their sums in
#           float32 for bfloat16 and float16, as sum, mean, scatter_add_ and scatter_reduce_ do; so does torch.histc its counts.
# Happens:  on a CPU they add up in the tensor's own type and stop at 256 (2,048 in float16). The mean of 5,000 numbers from 0
#           to 1 by segment_reduce is 0.05 in bfloat16: the longer the segment, the closer to zero. index_reduce_ with "mean"
#           counts in that type too, divides one stopped sum by another, and says 1.0 of the same numbers. torch.histc of a
#           bfloat16 weight has no bin above 256. Gradients of grid_sample, of replicate padding and of Tensor.unfold, where one
#           number is read many times, stop likewise. Nothing is said.
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
warnings.filterwarnings("ignore", message="index_reduce")  # it is announced as beta
torch.manual_seed(0)
count = 5000
index, lengths = torch.zeros(count, dtype=torch.long), torch.tensor([count])


def reductions(values):
    empty = torch.zeros(1, dtype=values.dtype)
    return {
        "mean": values.mean(),
        "scatter_reduce_ mean": empty.clone().scatter_reduce_(0, index, values, "mean", include_self=False),
        "scatter_add_ / count": empty.clone().scatter_add_(0, index, values).float() / count,
        "segment_reduce mean": torch.segment_reduce(values, "mean", lengths=lengths),
        "segment_reduce sum / count": torch.segment_reduce(values, "sum", lengths=lengths).float() / count,
        "index_reduce_ mean": empty.clone().index_reduce_(0, index, values, "mean", include_self=False),
    }


def leaf(*shape, dtype):
    return torch.ones(shape, dtype=dtype, requires_grad=True)


def reads(dtype):
    """Largest gradient of a sum over outputs that read one number count times or so."""
    pixel, edge, window = leaf(1, 1, 1, 1, dtype=dtype), leaf(1, 1, 1, dtype=dtype), leaf(2000, dtype=dtype)
    outputs = {
        "grid_sample": (F.grid_sample(pixel, torch.zeros(1, 1, count, 2, dtype=dtype), align_corners=False), pixel),
        "replicate padding": (F.pad(edge, (count, 0), mode="replicate"), edge),
        "unfold": (window.unfold(0, 1000, 1), window),
        "expand": (pixel.reshape(1).expand(count) * 1, pixel),
    }
    return {name: float(torch.autograd.grad(output.sum(), given)[0].max()) for name, (output, given) in outputs.items()}


print("torch", torch.__version__)
values = torch.rand(count)
dtypes = torch.float32, torch.bfloat16, torch.float16
seen = {str(dtype): {name: float(v) for name, v in reductions(values.to(dtype)).items()} for dtype in dtypes}
for dtype, found in seen.items():
    print(dtype, {name: round(value, 3) for name, value in found.items()})
right = seen["torch.float32"]["mean"]
for dtype, most in {"torch.bfloat16": 0.2, "torch.float16": 0.9}.items():
    for name, value in seen[dtype].items():
        if name.startswith("segment_reduce"):
            assert value < most * right, "this has changed"
        elif name.startswith("index_reduce_"):
            assert value > 1.5 * right, "this has changed"
        else:
            assert abs(value / right - 1) < 0.02, "this has changed"
bins = {dtype: torch.histc(values.to(dtype), 2, 0, 1).tolist() for dtype in dtypes}
print("histc with two bins:", bins)
assert bins[torch.bfloat16] == [256, 256] and bins[torch.float16] == [2048, 2048], "this has changed"
gradients = {dtype: reads(dtype) for dtype in (torch.float32, torch.bfloat16)}
for dtype, found in gradients.items():
    print(f"gradients in {dtype}: {found}")
assert all(gradients[torch.bfloat16][name] == 256 for name in ("grid_sample", "replicate padding", "unfold")), (
    "this has changed"
)
assert abs(gradients[torch.bfloat16]["expand"] / count - 1) < 0.01, "this has changed"
print("as described")
PY
