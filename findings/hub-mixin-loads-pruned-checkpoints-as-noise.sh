#!/usr/bin/env bash
# Guess:    from_pretrained of a class with huggingface_hub's PyTorchModelHubMixin raises, or warns as transformers does, where
#           the checkpoint does not fit the class: a network saved under torch.nn.utils.prune, whose file has weight_orig and
#           weight_mask, and loaded by a class that has weight.
# Happens:  strict is off unless asked for, and what was missing or left over is not reported. The network comes back with its
#           biases and norms as saved and its pruned weights as __init__ drew them, other ones in each call, in evaluation mode,
#           ready to use; no warning, no log. save_pretrained of the pruned network says nothing either. strict=True raises for
#           the keys. After prune.remove it loads as saved. safetensors' own load_model and load_state_dict raise.
# Seen with huggingface_hub 2.4.0, safetensors 0.8.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'huggingface_hub==2.4.0' 'safetensors==0.8.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import contextlib
import io
import logging
import tempfile
import warnings

import huggingface_hub
import safetensors
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_model
from torch import nn
from torch.nn.utils import prune

warnings.simplefilter("error")  # a warning would end the script
logs = io.StringIO()
for name in (None, "huggingface_hub"):
    logging.getLogger(name).addHandler(logging.StreamHandler(logs))


class Net(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width=32):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


print(
    "huggingface_hub", huggingface_hub.__version__, "safetensors", safetensors.__version__, "torch", torch.__version__
)
torch.manual_seed(0)
net = Net()
for layer in (net.first, net.second):
    prune.l1_unstructured(layer, "weight", 0.9)
folder = tempfile.mkdtemp()
net.save_pretrained(folder)
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    loaded, again = Net.from_pretrained(folder), Net.from_pretrained(folder)
share = [float((model.first.weight == 0).float().mean()) for model in (net, loaded)]
print("zeros in the weight: saved", round(share[0], 2), "loaded", round(share[1], 2))
print("biases as saved:", torch.equal(net.first.bias, loaded.first.bias))
print("two loads alike:", torch.equal(loaded.first.weight, again.first.weight))
print("said:", repr(printed.getvalue()), "logged:", repr(logs.getvalue()))
assert share[0] > 0.89 and share[1] < 0.01 and torch.equal(net.first.bias, loaded.first.bias), "this has changed"
assert not torch.equal(loaded.first.weight, again.first.weight), "this has changed"
assert "weight" not in printed.getvalue().replace("Loading weights from local directory", "") + logs.getvalue(), (
    "changed"
)
for name, load in {
    "strict=True": lambda: Net.from_pretrained(folder, strict=True),
    "safetensors.torch.load_model": lambda: load_model(Net(), folder + "/model.safetensors"),
    "load_state_dict": lambda: Net().load_state_dict(net.state_dict()),
}.items():
    try:
        load()
    except RuntimeError as error:
        print(f"{name} raises: {str(error)[:90]}".replace("\n", " "))
    else:
        raise AssertionError("this has changed")
for layer in (net.first, net.second):
    prune.remove(layer, "weight")
net.save_pretrained(folder)
with contextlib.redirect_stdout(printed):
    right = torch.equal(Net.from_pretrained(folder).first.weight, net.first.weight)
print("after prune.remove as saved:", right)
assert right, "this has changed"
print("as described")
PY
