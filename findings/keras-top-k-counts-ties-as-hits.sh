#!/usr/bin/env bash
# Guess:    the top-k accuracy that Keras reports for a network that gives all classes the same score is about chance, k of the number
#           of classes, as its accuracy is; with k=1 it is the accuracy.
# Happens:  a class that ties with the k-th best counts as among the best, so that a network whose output layer was pruned to
#           nothing has a top-1 and a top-5 accuracy of 100 %; its accuracy is 10 % of 10 classes. With a few weights left in that
#           layer, so that only some classes tie, both numbers are too high as well. With jax as backend it is the same.
# Seen with keras 3.15.1, tensorflow 2.21.0, jax 0.10.2 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 tensorflow==2.21.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/measure.py" <<'PY'
import keras
import numpy as np

generator = np.random.default_rng(0)
labels = np.repeat(np.arange(10), 100)
x = generator.standard_normal((1000, 32)).astype("float32")
x += 0.6 * generator.standard_normal((10, 32)).astype("float32")[labels]
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.layers.Input((32,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)])
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile("adam", loss)
model.fit(x, labels, epochs=20, verbose=0)
top = keras.metrics.SparseTopKCategoricalAccuracy
model.compile("adam", loss, metrics=["accuracy", top(k=1, name="top1"), top(k=5, name="top5")])


def measure(name):
    result = model.evaluate(x, labels, verbose=0, return_dict=True)
    logits = model.predict(x, verbose=0)
    best = np.argsort(-logits + 1e-12 * generator.random(logits.shape), axis=1)[:, :5]  # ties in random order
    fair = float((best == labels[:, None]).any(axis=1).mean())
    print(f"{keras.backend.backend()}, {name}: accuracy {result['accuracy']:.3f}, top-1 {result['top1']:.3f}, ", end="")
    print(f"top-5 {result['top5']:.3f}, top-5 with ties in random order {fair:.3f}")
    return result, fair


def pruned(layer, keep):
    kernel, bias = layer.get_weights()
    limit = np.sort(np.abs(kernel).ravel())[-keep] if keep else np.inf
    layer.set_weights([np.where(np.abs(kernel) >= limit, kernel, 0), np.zeros_like(bias)])


print("keras", keras.__version__)
trained, fair = measure("trained, dense")
assert abs(trained["top1"] - trained["accuracy"]) < 1e-6 and abs(trained["top5"] - fair) < 1e-6, "this has changed"
pruned(model.layers[1], 8)
few, fair = measure("8 weights left in the last layer")
assert few["top5"] > fair + 0.05 and few["top1"] > few["accuracy"], "this has changed"
pruned(model.layers[1], 0)
none, fair = measure("no weight left in the last layer")
assert none["top1"] == none["top5"] == 1 and abs(none["accuracy"] - 0.1) < 1e-6, "this has changed"
assert 0.4 < fair < 0.6, "this has changed"
print("as described")
PY
for backend in tensorflow jax; do
    CUDA_VISIBLE_DEVICES="" TF_CPP_MIN_LOG_LEVEL=3 KERAS_BACKEND=$backend "$folder/venv/bin/python" "$folder/measure.py"
done
