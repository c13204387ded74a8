#!/usr/bin/env bash
# Guess:    on a CPU torch keeps sums in bfloat16 in float32 and rounds once, as its sum, cumsum and matrix products do: the
#           gradient of an embedding's row that 4,000 tokens of a batch share, and a product with a sparse weight, are right to 8
#           bits.
# Happens:  where values are added to places, each addition is rounded: from 256 on a one adds nothing. The gradient of that row is
#           256 in nn.Embedding and nn.EmbeddingBag, the one of an indexed weight (weight[index]), index_add_ and index_put_ too,
#           while gather's, scatter_add_'s and that of expand are 4,000. Products with COO weights, their sums over an axis, and
#           coalesce() of entries at the same place do the same: of a layer with 4,000 inputs after a ReLU the outputs come out far
#           too small, where the dense weight's are right. float16 stops at 2,048. Nothing is said.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import nn

count = 4000
print("torch", torch.__version__, "true value of each sum:", count)


def gradient(parameter, output):
    output.sum().backward()
    return float(parameter.grad.flatten()[0])


def sums(dtype):
    index = torch.zeros(count, dtype=torch.long)
    ones, zero = torch.ones(count, dtype=dtype), torch.zeros(1, dtype=dtype)
    embedding, bag = nn.Embedding(1, 1, dtype=dtype), nn.EmbeddingBag(1, 1, mode="sum", dtype=dtype)
    indexed, gathered, expanded = (nn.Parameter(torch.ones(1, dtype=dtype)) for _ in range(3))
    weight, inputs = torch.ones(2, count, dtype=dtype), torch.ones(count, 3, dtype=dtype)
    sparse = weight.to_sparse()
    entries = torch.sparse_coo_tensor(index[None], ones, (1,))
    return {
        "gradient of nn.Embedding": gradient(embedding.weight, embedding(index)),
        "gradient of nn.EmbeddingBag": gradient(bag.weight, bag(index[:, None])),
        "gradient of weight[index]": gradient(indexed, indexed[index]),
        "index_add": float(zero.index_add(0, index, ones)),
        "index_put": float(zero.index_put((index,), ones, accumulate=True)),
        "COO weight @ inputs": float((sparse @ inputs)[0, 0]),
        "COO weight summed over an axis": float(torch.sparse.sum(sparse, 1).to_dense()[0]),
        "coalesce": float(entries.coalesce().values()),
    }, {
        "gradient of gather": gradient(gathered, gathered.gather(0, index)),
        "gradient of expand": gradient(expanded, expanded.expand(count)),
        "scatter_add": float(zero.scatter_add(0, index, ones)),
        "dense weight @ inputs": float((weight @ inputs)[0, 0]),
        "sum": float(ones.sum()),
        "cumsum": float(ones.cumsum(0)[-1]),
    }


for dtype, stop in {torch.bfloat16: 256, torch.float16: 2048, torch.float32: count}.items():
    short, right = sums(dtype)
    for name, value in (short | right).items():
        print(f"{dtype}, {name}: {value:.0f}")
    assert set(short.values()) == {stop} and set(right.values()) == {count}, "this has changed"
generator = torch.Generator().manual_seed(0)
weight = torch.rand(64, count, generator=generator).mul(0.1).bfloat16()
inputs = torch.randn(count, 16, generator=generator).relu().bfloat16()
true = weight.double() @ inputs.double()
for name, product in {"dense": weight @ inputs, "COO": weight.to_sparse() @ inputs}.items():
    error = float(((product.double() - true) / true).abs().mean())
    print(f"positive weights and inputs, {name}: mean relative error {error:.4f}")
    assert error > 0.1 if name == "COO" else error < 0.01, "this has changed"
print("as described")
PY
