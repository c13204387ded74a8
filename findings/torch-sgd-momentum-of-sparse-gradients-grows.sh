#!/usr/bin/env bash
# Guess:    SGD with momentum on an nn.Embedding(sparse=True) keeps at most one row of momentum for each row of the embedding: the
#           optimizer's state is no larger than the weight, and a step costs the same at the end as at the beginning.
# Happens:  each step appends the rows of its batch to the momentum buffer, whether they are in it already or not. Of an embedding of
#           1,000 rows, trained with 500 tokens a step, it holds 50,000 rows after 100 steps, fifty times the weight's memory,
#           each step reads all of them, and the state dict of the optimizer is as large. Rows are only put together once there
#           are more of them than the weight has numbers, that is width times as many as it has rows. Nothing is said. Calling
#           coalesce() on the buffer gives the same momentum in 1,000 rows.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import io
import warnings

import torch
from torch import nn

warnings.simplefilter("error")  # a warning would end the script
rows, width, tokens = 1000, 64, 500


def train(steps, sparse, coalesce=False):
    torch.manual_seed(0)
    embedding = nn.Embedding(rows, width, sparse=sparse)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        embedding(torch.randint(rows, (tokens,))).square().sum().backward()
        optimizer.step()
        state = optimizer.state[embedding.weight]
        if coalesce:
            state["momentum_buffer"] = state["momentum_buffer"].coalesce()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return embedding.weight.detach(), state["momentum_buffer"], len(file.getvalue())


print("torch", torch.__version__)
held = {}
for steps in (1, 10, 100, 300):
    weight, buffer, size = train(steps, sparse=True)
    held[steps] = buffer._nnz()
    print(f"after {steps} steps: {held[steps]} rows of momentum for {rows} rows of weight, {size / 1e6:.1f} MB saved")
dense, _, dense_size = train(300, sparse=False)
merged, buffer, merged_size = train(300, sparse=True, coalesce=True)
print(f"dense gradients: {dense_size / 1e6:.1f} MB; coalesced after each step: {buffer._nnz()} rows, {merged_size / 1e6:.1f} MB")
assert all(torch.allclose(other, dense, atol=1e-5) for other in (weight, merged)), "this has changed"
assert held[100] > 40 * rows and held[300] > 100 * rows and buffer._nnz() <= rows, "this has changed"
assert size > 50 * dense_size, "this has changed"
print("as described")
PY
