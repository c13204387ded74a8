#!/usr/bin/env bash
# Guess:    quantizing the weights of a pruned layer leaves its zeros zero, with quanto as with HQQ and at any number of bits, as an
#           integer zero point does; what is lost is lost on the weights that are there.
# Happens:  quanto's qint8 and float8 keep the zeros. Its qint4 and qint2, and HQQ at 8, 4 and 2 bits, have a zero point that is not an
#           integer, so that zero is not among a group's values: nearly all pruned weights of a group with anything left in it come
#           back as small numbers. At 4 bits and 5 % density, behind a ReLU, quanto's absent weights move a layer's output by
#           about thirty times as much as the rounding of its kept ones does, as their errors have one sign; HQQ's, whose zero
#           point is fitted, by two thirds as much. Nothing is said.
# Seen with optimum-quanto 0.2.7, hqq 0.2.8.post1, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11. quanto compiles an extension
#           at its first use: a C++ compiler has to be there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.15.0' 'optimum-quanto==0.2.7' 'hqq==0.2.8.post1' 'numpy==2.4.6' setuptools
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from hqq.core.quantize import Quantizer
from optimum import quanto
from torch import nn
from torch.nn.utils import prune

torch.manual_seed(0)
pruned = nn.Linear(512, 256, bias=False)
nn.init.normal_(pruned.weight)
prune.random_unstructured(pruned, "weight", 0.95)
prune.remove(pruned, "weight")
weight = pruned.weight.detach()
x = torch.randn(64, 512).relu()  # after a ReLU: inputs of one sign add the small numbers up


def by_quanto(kind):
    model = nn.Sequential(nn.Linear(512, 256, bias=False))
    model[0].weight.data.copy_(weight)
    quanto.quantize(model, weights=kind)
    quanto.freeze(model)
    return model[0].weight.dequantize().detach()


def by_hqq(bits):
    stored, meta = Quantizer.quantize(weight, nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32)
    return Quantizer.dequantize(stored, meta).reshape(weight.shape)


seen = {}
kinds = {f"quanto {kind.name}": by_quanto(kind) for kind in (quanto.qint8, quanto.qfloat8, quanto.qint4, quanto.qint2)}
kinds |= {f"HQQ, {bits} bits": by_hqq(bits) for bits in (8, 4, 2)}
for name, found in kinds.items():
    error = found - weight
    absent, kept = (float((x @ (error * part).T).square().mean().sqrt()) for part in (weight == 0, weight != 0))
    seen[name] = round(float((found[weight == 0] != 0).float().mean()), 3), absent, kept
    print(f"{name}: {seen[name][0]:.1%} of the zeros are gone; they move the output by {absent:.4f}, kept weights by {kept:.4f}")
zeros_gone = [share for share, _, _ in seen.values()]
assert zeros_gone[:2] == [0, 0] and min(zeros_gone[2:]) > 0.8, "this has changed"
assert seen["quanto qint4"][1] > 10 * seen["quanto qint4"][2], "this has changed"
assert seen["HQQ, 4 bits"][1] > 0.4 * seen["HQQ, 4 bits"][2], "this has changed"
print("as described")
PY
