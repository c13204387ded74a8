#!/usr/bin/env bash
# Guess:    a pruned model converted for LiteRT with Optimize.DEFAULT and Optimize.EXPERIMENTAL_SPARSITY together, weights in 8 bits
#           and without their zeros, runs in the interpreter as with either alone.
# Happens:  the converter is content, and the default interpreter refuses its file at allocate_tensors(): the XNNPACK delegate, which
#           it applies by itself, takes the layer and "failed to prepare". Without default delegates the file runs and is right.
#           Sparsity alone, DEFAULT alone, and both with a representative dataset load. At half density the sparse 8-bit file,
#           with a representative dataset, is larger than the dense one.
# Seen with tensorflow 2.21.0, tf_keras 2.21.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorflow==2.21.0 tf_keras==2.21.0 numpy==2.4.6
CUDA_VISIBLE_DEVICES="" TF_CPP_MIN_LOG_LEVEL=3 TF_USE_LEGACY_KERAS=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import numpy as np
import tensorflow as tf
import tf_keras

generator = np.random.default_rng(0)
x = generator.standard_normal((32, 64)).astype(np.float32)
resolvers = tf.lite.experimental.OpResolverType
ways = {"default": resolvers.AUTO, "no delegate": resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES}


def converted(model, optimizations, full):
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = optimizations
    if full:
        converter.representative_dataset = lambda: ([row[None]] for row in x)
    return converter.convert()


def outputs(file, way):
    interpreter = tf.lite.Interpreter(model_content=file, experimental_op_resolver_type=ways[way])
    interpreter.allocate_tensors()
    found = []
    for row in x:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], row[None])
        interpreter.invoke()
        found.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0])
    return np.array(found)


print("tensorflow", tf.__version__)
quantize, sparse = tf.lite.Optimize.DEFAULT, tf.lite.Optimize.EXPERIMENTAL_SPARSITY
cases = {"sparse": ([sparse], False), "int8": ([quantize], False), "int8 full": ([quantize], True)}
cases |= {"int8 and sparse": ([quantize, sparse], False), "int8 full and sparse": ([quantize, sparse], True)}
sizes, refused = {}, set()
for density in (0.1, 0.5):
    model = tf_keras.Sequential([tf_keras.layers.Dense(256, input_shape=(64,)), tf_keras.layers.Dense(10)])
    for layer in model.layers:  # the zeros are scattered, no blocks
        layer.kernel.assign(layer.kernel.numpy() * (generator.random(layer.kernel.shape) < density))
    expected = model(x).numpy()
    for name, (optimizations, full) in cases.items():
        file = converted(model, optimizations, full)
        sizes[name, density] = len(file)
        for way in ways:
            try:
                error = np.abs(outputs(file, way) - expected).max() / np.abs(expected).max()
                print(f"density {density}, {name}, {way}: {len(file)} bytes, relative error {error:.4f}")
                assert error < 0.05, "this has changed"
            except RuntimeError as refusal:
                print(f"density {density}, {name}, {way}: {len(file)} bytes, {refusal}")
                assert "failed to prepare" in str(refusal), "this has changed"
                refused.add((name, way, density))
assert refused == {("int8 and sparse", "default", density) for density in (0.1, 0.5)}, "this has changed"
assert sizes["int8 and sparse", 0.1] < sizes["int8", 0.1], "this has changed"
assert sizes["int8 full and sparse", 0.5] > sizes["int8 full", 0.5], "this has changed"
print("as described")
PY
