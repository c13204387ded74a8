#!/usr/bin/env bash
# Guess:    half(), bfloat16() and to(torch.float16) of a tensordict cast its weights and leave ids, step counts and boolean
#           masks as they are, as the same calls on an nn.Module do, of which TensorDict.from_module takes parameters and
#           buffers.
# Happens:  every tensor is cast. Boolean masks become floats, so that what is picked by them raises or, multiplied, still
#           works; ids and counts lose digits in silence: in float16 70,000 is infinite and 2,049 is 2,048, in bfloat16 1,001 is
#           1,000. A network taken from a module, cast and put back has a batch norm whose count of batches is a float, and a
#           mask that cannot be an index. float() and double() do so too. Nothing is said.
# Seen with tensordict 0.15.3, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'tensordict==0.15.3' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import copy
import warnings
from importlib.metadata import version

import torch
from tensordict import TensorDict
from torch import nn

warnings.simplefilter("error")  # a warning would end the script
print("tensordict", version("tensordict"), "torch", torch.__version__)
batch = TensorDict(
    {"x": torch.ones(3), "id": torch.tensor([1001, 2049, 70000]), "mask": torch.tensor([True, False, True])},
    batch_size=3,
)
for name, cast in {
    "half()": lambda given: given.half(),
    "bfloat16()": lambda given: given.bfloat16(),
    "to(float16)": lambda given: given.to(torch.float16),
    "float()": lambda given: given.float(),
}.items():
    result = cast(batch)
    print(f"{name}: id {result['id'].tolist()}, mask {result['mask'].tolist()}, {result['mask'].dtype}")
    assert result["id"].is_floating_point() and result["mask"].is_floating_point(), "this has changed"
assert batch.half()["id"].tolist() == [1001, 2048, float("inf")] and batch.bfloat16()["id"][0] == 1000, (
    "this has changed"
)
net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
net[0].register_buffer("mask", torch.rand(4, 4) < 0.5)
by_module = copy.deepcopy(net).half()
through = copy.deepcopy(net)
TensorDict.from_module(net).data.half().to_module(through)
types = {
    name: [str(model[1].num_batches_tracked.dtype), str(model[0].mask.dtype)]
    for name, model in {"nn.Module.half()": by_module, "tensordict": through}.items()
}
print("count and mask of a module:", types)
assert types == {
    "nn.Module.half()": ["torch.int64", "torch.bool"],
    "tensordict": ["torch.float16", "torch.float16"],
}, "this has changed"
assert by_module[0].weight[by_module[0].mask].numel() == int(net[0].mask.sum())
try:
    through[0].weight[through[0].mask]
except IndexError as error:
    print("the mask as an index raises:", error)
else:
    raise AssertionError("this has changed")
print("as described")
PY
