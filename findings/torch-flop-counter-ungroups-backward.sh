#!/usr/bin/env bash
# Guess:    FlopCounterMode counts a backward pass as twice its forward, for grouped and depthwise convolutions as for dense ones,
#           which it counts so.
# Happens:  the gradient of a grouped convolution's weight is counted as if the groups were not there, so once more for each group:
#           with g groups forward and backward together count as 2 + g forwards, not as 3. A depthwise convolution over 64
#           channels shows 22 times what training it costs, and outweighs the dense convolutions around it.
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


def counted(groups, backward):
    convolution = nn.Conv2d(64, 64, 3, padding=1, groups=groups, bias=False)
    image = torch.randn(1, 64, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = convolution(image)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


ratios = {}
for groups in (1, 2, 8, 64):
    forward, both = counted(groups, False), counted(groups, True)
    assert forward == 2 * 64 * 64 * 64 * 9 // groups, "this has changed"
    ratios[groups] = both / forward
    print(f"groups {groups}: forward {forward} FLOPs, with backward {both}, ratio {ratios[groups]}")
assert ratios == {1: 3, 2: 4, 8: 10, 64: 66}, "this has changed"
print("as described")
PY
