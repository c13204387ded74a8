#!/usr/bin/env bash
# Guess:    after nncf.strip a model pruned by nncf.prune is an ordinary one: its weights hold the zeros, and nothing of
#           NNCF is left in it.
# Happens:  strip changes nothing: the stored weights have no zero, as before, and the masks stay in the state dict and in
#           the forward as hooks. Loaded without NNCF, the weights are those of a dense network. (strip also imports
#           torchao, which NNCF does not install.)
# Seen with nncf 3.4.0, torchao 0.18.0 and torch 2.15.0, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'nncf==3.4.0' 'torchao==0.18.0'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
from torch import nn

warnings.filterwarnings("ignore")
import nncf

torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x):
        return self.linear(x)


x = torch.randn(2, 16)
pruned = nncf.prune(Model(), mode=nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.5, examples_inputs=x)
stripped = nncf.strip(pruned, do_copy=True, example_input=x)
plain = Model()
plain.load_state_dict({name: p.detach() for name, p in stripped.named_parameters()})
for name, model in {"pruned": pruned, "stripped": stripped}.items():
    masks = [key for key in model.state_dict() if "mask" in key]
    print(f"{name}: zeros in the weight {int((model.linear.weight == 0).sum())} of 128, masks {masks}")
same = torch.equal(stripped(x), pruned(x)), torch.allclose(plain(x), pruned(x))
print(f"outputs like the pruned model's: stripped {same[0]}, its parameters in a plain model {same[1]}")
assert int((stripped.linear.weight == 0).sum()) == 0, "this has changed"
assert any("mask" in key for key in stripped.state_dict()) and same == (True, False), "this has changed"
print("as described")
PY
