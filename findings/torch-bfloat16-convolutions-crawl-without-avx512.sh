#!/usr/bin/env bash
# Guess:    on a CPU without instructions for bfloat16 a convolution in bfloat16 costs at most two or three times one in
#           float32, the time to convert its operands and back; so do float16 and a training step under autocast, whatever the
#           layout.
# Happens:  where the CPU has no AVX-512, the forward of a convolution falls back to a kernel that takes twenty to thirty times
#           as long as float32's, and a training step under autocast ten times and more. It is the layout: in channels_last the
#           same convolution takes about three times as long as in float32, and its backward does so in any layout. Converting
#           to float32, convolving and rounding the result takes as long as float32 does and gives the same numbers but for a
#           rounding here and there. Nothing is said. Ratios are taken in one run, with one thread; a CPU with AVX-512 or one
#           that is not x86 has nothing to show.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU (AVX2), Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

flags = open("/proc/cpuinfo").read() if sys.platform == "linux" else ""
if "avx2" not in flags or "avx512bw" in flags:
    sys.exit(print("this CPU has AVX-512 or no AVX2: nothing to show"))
torch.set_num_threads(1)
torch.manual_seed(0)


def seconds(act):
    act()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return min(times)


print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
x, w = torch.randn(4, 64, 28, 28), torch.randn(64, 64, 3, 3)
upstream = torch.randn(4, 64, 28, 28)


def conv(x, w):
    return F.conv2d(x, w, padding=1)


def backward(upstream, x, w):
    return torch.ops.aten.convolution_backward(
        upstream, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )


def last(tensor):
    return tensor.to(memory_format=torch.channels_last)


base = {
    "convolution": seconds(lambda: conv(x, w)),
    "its backward": seconds(lambda: backward(upstream, x, w)),
}
for dtype in (torch.bfloat16, torch.float16):
    a, b, g = (tensor.to(dtype) for tensor in (x, w, upstream))
    ratios = {
        "convolution": seconds(lambda: conv(a, b)) / base["convolution"],
        "convolution in channels_last": seconds(lambda: conv(last(a), last(b))) / base["convolution"],
        "convolution by way of float32": seconds(lambda: conv(a.float(), b.float()).to(dtype)) / base["convolution"],
        "its backward": seconds(lambda: backward(g, a, b)) / base["its backward"],
    }
    print(f"{dtype}, times float32:", {name: round(ratio, 1) for name, ratio in ratios.items()})
    other = float((conv(a, b) != conv(a.float(), b.float()).to(dtype)).float().mean())
    print(f"  share of numbers that differ from those by way of float32: {other:.4f}")
    slow, fast = ratios["convolution"], ratios["convolution in channels_last"]
    assert slow > 8 and slow > 3 * fast and slow > 5 * ratios["convolution by way of float32"], "this has changed"
    assert other < 0.01, "this has changed"
layer = nn.Conv2d(64, 64, 3, padding=1)


def step(enabled):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = layer(x).sum()
    loss.backward()


ratio = seconds(lambda: step(True)) / seconds(lambda: step(False))
print(f"training step under autocast: {ratio:.1f} times float32")
assert ratio > 5, "this has changed"
print("as described")
PY
