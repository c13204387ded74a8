#!/usr/bin/env bash
# Guess:    an mlx module keeps a mask of booleans as an attribute and multiplies its weight by it. Booleans have no gradient, so
#           value_and_grad passes over the mask, or raises; it is not trained.
# Happens:  every array that a module has as an attribute is a parameter, whatever its dtype. The mask gets a gradient of booleans,
#           True where the real one is not zero, and the optimizers take it: SGD inverts the mask at every step, so that every
#           second one computes with the absent edges alone; Adam turns the mask into float32 numbers around -3. Nothing is said.
#           A mask of float32 is trained as a weight is. freeze(keys="mask"), or a name that begins with an underscore (which
#           leaves it out of the saved weights), keeps it.
# Seen with mlx 0.32.4 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers

mx.set_default_device(mx.cpu)
generator = np.random.default_rng(0)
keep = generator.random((4, 8)) < 0.25
x = mx.array(generator.standard_normal((64, 8)).astype(np.float32))
y = mx.array(generator.standard_normal((64, 4)).astype(np.float32))


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.layer, self.mask = nn.Linear(8, 4), mask

    def __call__(self, x):
        return x @ (self.layer.weight * self.mask).T + self.layer.bias


def masks(optimizer, mask, steps, frozen=False):
    mx.random.seed(0)
    model = Masked(mask)
    if frozen:
        model.freeze(keys="mask", recurse=False)
    loss = nn.value_and_grad(model, lambda model, x, y: ((model(x) - y) ** 2).mean())
    seen = []
    for _ in range(steps):
        _, gradients = loss(model, x, y)
        optimizer.update(model, gradients)
        seen.append(np.array(model.mask))
    return seen


print("mlx", version("mlx"), "first row of the mask", keep[0].astype(int))
booleans = mx.array(keep)
after_sgd = masks(optimizers.SGD(0.01), booleans, 3)
after_adam = masks(optimizers.Adam(0.01), booleans, 3)
as_floats = masks(optimizers.SGD(0.1), booleans.astype(mx.float32), 20)[-1]
print("after each of three steps of SGD:", [mask[0].astype(int).tolist() for mask in after_sgd])
print("after one step of Adam:", after_adam[0].dtype, [round(float(value), 2) for value in after_adam[0][0]])
print("a mask of float32 after 20 steps of SGD:", [round(float(value), 3) for value in as_floats[0]])
for step, mask in enumerate(after_sgd):
    assert mask.dtype == bool and np.array_equal(mask, keep if step % 2 else ~keep), "this has changed"
assert after_adam[-1].dtype == np.float32 and np.abs(after_adam[-1] - keep).min() > 1, "this has changed"
assert (as_floats[~keep] != 0).all(), "this has changed"
frozen = masks(optimizers.SGD(0.01), booleans, 3, frozen=True)
assert all(np.array_equal(mask, keep) for mask in frozen), "this has changed"
print("as described")
PY
