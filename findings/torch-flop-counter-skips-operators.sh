#!/usr/bin/env bash
# Guess:    FlopCounterMode counts an LSTM as it does a GRU, and a transformer layer in evaluation as in training; or it names the
#           operators it has no formula for.
# Happens:  operators it does not know count as nothing, and nothing is said. On a CPU a GRU is counted in full, an LSTM with 0
#           FLOPs. An nn.MultiheadAttention and an nn.TransformerEncoderLayer have all their products in training and in
#           evaluation with gradients, and 0 under no_grad, where one fused operator computes them: the usual way to measure
#           inference. A product of a matrix and a vector counts as 0 too, of a matrix and a column in full.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)


def counted(model, *inputs):
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


rows = torch.randn(1, 5, 8)
seen = {"GRU": counted(nn.GRU(8, 16, batch_first=True), rows), "LSTM": counted(nn.LSTM(8, 16, batch_first=True), rows)}
attention = nn.MultiheadAttention(8, 2, batch_first=True)
modules = {
    "attention": lambda x: attention(x, x, x, need_weights=False)[0],
    "transformer layer": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
}
for name, model in modules.items():
    owner = attention if name == "attention" else model
    for training in (True, False):
        owner.train(training)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                mode = f"{'train' if training else 'eval'}, {'gradients' if gradients else 'no_grad'}"
                seen[f"{name}, {mode}"] = counted(model, rows)
seen["matrix @ column"] = counted(torch.matmul, torch.randn(8, 8), torch.randn(8, 1))
seen["matrix @ vector"] = counted(torch.matmul, torch.randn(8, 8), torch.randn(8))
for name, flops in seen.items():
    print(f"{name}: {flops} FLOPs")
assert seen["GRU"] == 2 * 5 * 3 * 16 * (8 + 16) and seen["LSTM"] == 0, "this has changed"
for name in modules:
    assert seen[f"{name}, train, gradients"] == seen[f"{name}, eval, gradients"] > 0, "this has changed"
    assert seen[f"{name}, eval, no_grad"] == 0, "this has changed"
assert (seen["matrix @ column"], seen["matrix @ vector"]) == (128, 0), "this has changed"
print("as described")
PY
