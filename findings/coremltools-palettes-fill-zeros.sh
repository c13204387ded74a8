#!/usr/bin/env bash
# Guess:    coremltools' palettize_weights gives each weight the nearest of its 2^n values, and a pruned weight, nine tenths of
#           which are exact zeros, gets zero as one of them.
# Happens:  no mode has a zero. mode="uniform" spreads its values evenly from the smallest to the largest weight, so that zero
#           falls between two of them and every pruned weight gets the same small value of one sign: what a layer adds up over
#           its absent edges can outweigh what its kept ones compute. mode="kmeans" gives them a value near 1e-9: harmless to the
#           output, but no weight counts as zero any more. Pruned with prune_weights first and palettized with
#           joint_compression=True, the zeros stay.
# Seen with coremltools 9.0, scikit-learn 1.9.1 and numpy 2.4.6, CPU, Python 3.11, on Linux, where models can be converted but not run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet coremltools==9.0 scikit-learn==1.9.1 numpy==2.4.6
"$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { cat "$folder/log"; exit 1; }
import logging

import coremltools
import numpy as np
from coremltools.converters.mil.mil import Builder
from coremltools.optimize import coreml

logging.disable(logging.WARNING)
generator = np.random.default_rng(0)
weight = generator.standard_normal((64, 256)).astype(np.float32)
weight[np.abs(weight) < np.quantile(np.abs(weight), 0.9)] = 0


@Builder.program(input_specs=[Builder.TensorSpec(shape=(1, 256))], opset_version=coremltools.target.iOS18)
def layer(x):
    return Builder.linear(x=x, weight=weight, bias=np.zeros(64, np.float32))


dense = coremltools.convert(
    layer, minimum_deployment_target=coremltools.target.iOS18, compute_precision=coremltools.precision.FLOAT32
)
sparse = coreml.prune_weights(
    dense, config=coreml.OptimizationConfig(global_config=coreml.OpThresholdPrunerConfig(threshold=1e-12))
)


def stored(model):
    (found,) = coreml.get_weights_metadata(coreml.decompress_weights(model), weight_threshold=1000).values()
    return found.val


def palettized(mode, joint):
    config = coreml.OptimizationConfig(global_config=coreml.OpPalettizerConfig(nbits=4, mode=mode))
    return stored(coreml.palettize_weights(sparse if joint else dense, config=config, joint_compression=joint))


assert np.array_equal(stored(sparse), weight)
print("coremltools", coremltools.__version__, "zeros in the weight:", round(float((weight == 0).mean()), 3))
absent, x = weight == 0, np.ones(256, np.float32)
seen = {}
for mode in ("uniform", "kmeans"):
    for joint in (False, True):
        values = palettized(mode, joint)
        wrong = np.abs((values - weight) @ x).max() / np.abs(weight @ x).max()
        seen[mode, joint] = (float((values == 0).mean()), np.unique(values[absent]), float(wrong))
        print(f"4 bits, {mode}, joint compression {joint}: zeros {seen[mode, joint][0]:.3f},", end=" ")
        print(f"absent weights get {seen[mode, joint][1]}, largest error to largest output {wrong:.3f}")
for mode in ("uniform", "kmeans"):
    zeros, values, _ = seen[mode, False]
    assert zeros == 0 and len(values) == 1, "this has changed"
    assert seen[mode, True][0] > 0.89 and list(seen[mode, True][1]) == [0], "this has changed"
assert seen["uniform", False][2] > 0.5 and abs(seen["kmeans", False][1][0]) < 1e-7, "this has changed"
print("as described")
PY
