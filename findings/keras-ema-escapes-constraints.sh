#!/usr/bin/env bash
# Guess:    a Keras layer pruned by a kernel_constraint that multiplies by a mask has its zeros in the moving average of the
#           optimizer (use_ema=True) too: the constraint holds after each step, and an average of zeros is zero.
# Happens:  the average is taken inside the step, of the weights before the constraint is applied, and fit() ends by replacing the
#           weights by it without applying the constraint again. During training, in callbacks too, the absent weights are zero;
#           after fit() those of them that got a gradient are not, though the mask never changed and the layer began with it. A
#           layer that begins with dense weights gets all of them back, nearly as large as the kept ones. NonNeg leaves negative
#           weights in the same way. Applying the constraint once more after fit() mends it.
# Seen with keras 3.15.1 on jax 0.10.2, numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PY'
import jax
import keras
import numpy as np

generator = np.random.default_rng(0)
mask = (generator.random((16, 32)) < 0.1).astype(np.float32)
x = generator.standard_normal((640, 16)).astype(np.float32)
y = generator.standard_normal((640, 4)).astype(np.float32)


class Masked(keras.constraints.Constraint):
    def __call__(self, weight):
        return weight * mask


def absent(model):
    return np.asarray(model.layers[0].kernel)[mask == 0]


class Look(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        assert (absent(self.model) == 0).all(), "this has changed"


def trained(start_sparse, constraint, callbacks=(), **options):
    keras.utils.set_random_seed(0)
    first = keras.layers.Dense(32, activation="relu", kernel_constraint=constraint)
    model = keras.Sequential([keras.Input((16,)), first, keras.layers.Dense(4)])
    if start_sparse:
        first.kernel.assign(first.kernel * mask)
    model.compile(keras.optimizers.Adam(0.01, **options), "mse")
    model.fit(x, y, epochs=3, batch_size=64, verbose=0, callbacks=list(callbacks))
    return model


print("keras", keras.__version__, "jax", jax.__version__)
seen = {}
for start_sparse in (True, False):
    for options in ({}, {"use_ema": True}, {"use_ema": True, "ema_overwrite_frequency": 4}):
        model = trained(start_sparse, Masked(), [Look()], **options)
        kept = np.abs(np.asarray(model.layers[0].kernel)[mask == 1]).mean()
        share, size = (absent(model) != 0).mean(), np.abs(absent(model)).mean() / kept
        seen[start_sparse, len(options)] = share, size
        print(f"from {'sparse' if start_sparse else 'dense'} weights, {options}: after fit", end=" ")
        print(f"{share:.2f} of the absent weights are not zero, mean size {size:.4f} of the kept ones'")
smallest = {ema: float(np.asarray(trained(False, "non_neg", use_ema=ema).layers[0].kernel).min()) for ema in (False, True)}
print("smallest weight under non_neg, by use_ema:", smallest)
assert seen[True, 0][0] == 0 and seen[False, 0][0] == 0, "this has changed"
assert min(seen[True, n][0] for n in (1, 2)) > 0.5 and min(seen[False, n][0] for n in (1, 2)) == 1, "this has changed"
assert min(seen[False, n][1] for n in (1, 2)) > 0.5, "this has changed"
assert smallest[False] >= 0 > smallest[True], "this has changed"
print("as described")
PY
