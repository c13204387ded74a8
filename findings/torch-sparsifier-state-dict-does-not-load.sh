#!/usr/bin/env bash
# Guess:    a model under a torch.ao.pruning sparsifier is saved and loaded as any other: load_state_dict(state_dict()) of the same
#           model finds all its keys.
# Happens:  it raises for a missing key. The masks are buffers that loading asks for and that the state dict leaves out; also with
#           prepare() done alike on a fresh model. With strict=False the weights are loaded and the new model is dense until
#           the sparsifier's own state dict, where the masks are, is loaded too. torch.export puts the masks in its
#           state dict all the same.
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


def prepared(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16))
    sparsifier = WeightNormSparsifier(sparsity_level=0.75, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    return model, sparsifier


def error_of(work):
    try:
        work()
    except RuntimeError as error:
        return " ".join(str(error).split())
    return "none"


model, sparsifier = prepared(0)
sparsifier.step()
fresh, fresh_sparsifier = prepared(1)
errors = [error_of(lambda other=other: other.load_state_dict(model.state_dict())) for other in (model, fresh)]
print("buffers", [name for name, _ in model.named_buffers()], "state dict", list(model.state_dict()))
print("into itself:", errors[0])
print("into a fresh one:", errors[1])


def zeros(network):
    return float((network[0].weight == 0).float().mean())


fresh.load_state_dict(model.state_dict(), strict=False)
seen = [zeros(model), zeros(fresh)]
fresh_sparsifier.load_state_dict(sparsifier.state_dict())
seen.append(zeros(fresh))
print("zeros: saved model, loaded model, with the sparsifier's state too", seen)
exported = list(torch.export.export(model, (torch.randn(2, 16),)).state_dict)
print("state dict of the exported model", exported)
assert all('Missing key(s) in state_dict: "0.parametrizations.weight.0.mask"' in error for error in errors)
assert seen == [0.75, 0.0, 0.75], "this has changed"
assert "0.parametrizations.weight.0.mask" in exported, "this has changed"
print("as described")
PY
