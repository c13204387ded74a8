#!/usr/bin/env bash
# Guess:    the gradients of a layer norm's weight and bias in bfloat16 are sums kept in float32 and rounded once, as those of a
#           batch norm, a group norm, an rms norm and of a linear layer's bias are; training in bfloat16 has rounding errors of
#           1 %.
# Happens:  on a CPU they are added up in bfloat16 itself, over all tokens of the batch, and stop growing at 256 times the size
#           of a summand: of 5,000 tokens with a gradient of 1 each the bias gets 256, with two threads 512, in float16 2,048.
#           Where the gradients have one sign nine tenths of the sum are lost; random ones, which cancel, are off by a tenth.
#           Weight and bias in float32 do not help, as the sums are kept in the input's type: a float32 network under autocast,
#           whose norm reads the bfloat16 output of a linear layer, has a float32 gradient of 256 too. Nothing is said.
# Seen with torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
import torch.nn.functional as F
from torch import nn

warnings.simplefilter("error")  # a warning would end the script
torch.set_num_threads(1)
torch.manual_seed(0)
tokens, width = 5000, 64
inputs = torch.randn(tokens, width)


def layer_norm(x, weight, bias):
    return F.layer_norm(x, (width,), weight, bias)


def batch_norm(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, training=True)


def group_norm(x, weight, bias):
    return F.group_norm(x, 4, weight, bias)


def rms_norm(x, weight, bias):
    return F.rms_norm(x, (width,), weight) + bias


def gradients(norm, dtype, upstream, parameters=None):
    """Gradients of weight and bias."""
    leaves = [value.to(parameters or dtype).requires_grad_() for value in (torch.ones(width), torch.zeros(width))]
    output = norm(inputs.to(dtype), *leaves)
    return [found.float() for found in torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def error(found, right):
    return float((found - right).norm() / right.norm())


ones, signed = torch.ones(tokens, width), torch.randn(tokens, width)
positive = torch.rand(tokens, width)
print("torch", torch.__version__)
bias = {dtype: gradients(layer_norm, dtype, ones)[1].unique().tolist() for dtype in (torch.bfloat16, torch.float16)}
print(f"bias gradient of a layer norm, {tokens} tokens with a gradient of 1: {bias}")
assert bias == {torch.bfloat16: [256], torch.float16: [2048]}, "this has changed"
torch.set_num_threads(2)
two = gradients(layer_norm, torch.bfloat16, ones)[1].unique().tolist()
torch.set_num_threads(1)
print("the same with two threads:", two)
assert two == [512], "this has changed"
for norm in (layer_norm, batch_norm, group_norm, rms_norm):
    seen = {}
    for name, upstream in {"one sign": positive, "both signs": signed}.items():
        upstream = upstream.bfloat16().float()
        right = gradients(norm, torch.float32, upstream)
        seen[name] = [error(*pair) for pair in zip(gradients(norm, torch.bfloat16, upstream), right, strict=True)]
    rounded = {name: [round(value, 3) for value in values] for name, values in seen.items()}
    print(f"{norm.__name__} in bfloat16: relative error of weight and bias", rounded)
    if norm is layer_norm:
        assert seen["one sign"][1] > 0.7 and min(seen["both signs"]) > 0.04, "this has changed"
    else:
        assert seen["one sign"][1] < 0.02 and seen["both signs"][1] < 0.02, "this has changed"
right = gradients(layer_norm, torch.float32, positive)
mixed = gradients(layer_norm, torch.bfloat16, positive, parameters=torch.float32)
print("weight and bias in float32, input in bfloat16:", round(error(mixed[1], right[1]), 4))
assert error(mixed[1], right[1]) > 0.7, "this has changed"
net = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
for enabled in (False, True):
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        net(inputs).sum().backward()
    found = net[1].bias.grad.unique().tolist(), str(net[1].bias.grad.dtype)
    print(f"float32 network of a linear layer and a layer norm, autocast {enabled}: bias gradient of the norm {found}")
    assert found[0] == [256 if enabled else tokens], "this has changed"
print("as described")
PY
