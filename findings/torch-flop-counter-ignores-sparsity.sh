#!/usr/bin/env bash
# Guess:    FlopCounterMode counts what is computed: a product with a CSR weight of 10 % density has a tenth of the FLOPs
#           of the dense one.
# Happens:  it counts from shapes and layout does not matter: both products get the same number.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

warnings.filterwarnings("ignore")  # CSR is announced as beta
torch.manual_seed(0)
weight = torch.randn(64, 64) * (torch.rand(64, 64) < 0.1)
x = torch.randn(5, 64)
counted = {}
for name, w in {"dense": weight, "CSR": weight.to_sparse_csr()}.items():
    with FlopCounterMode(display=False) as counter:
        F.linear(x, w)
    counted[name] = counter.get_total_flops()
print(f"entries {int(weight.count_nonzero())} of {weight.numel()}, FLOPs counted {counted}")
assert counted == {"dense": 2 * 5 * 64 * 64, "CSR": 2 * 5 * 64 * 64}, "this has changed"
print("as described")
PY
