#!/usr/bin/env bash
# Guess:    mnnconvert quantizes weights as its help says: symmetrically unless --weightQuantAsymmetric is given. So with 8 bits
#           and no more options the zeros of a pruned weight stay zeros.
# Happens:  the flag does the reverse. Without it the weights are quantized asymmetrically: zero is no longer among the values, and
#           every pruned weight comes back as a small number. With it, "=false" too, the file is the smaller, symmetric one, and
#           zeros are exact. Who keeps to the help for the sake of old runtimes, or of zeros, gets the other format.
# Seen with mnn 3.6.1, onnx 1.23.2 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mnn==3.6.1 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import os
import subprocess
import sys
from importlib.metadata import version

import MNN.expr
import MNN.nn
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

generator = np.random.default_rng(0)
weight = generator.standard_normal((64, 32)).astype(np.float32)
weight[np.abs(weight) < np.quantile(np.abs(weight), 0.9)] = 0
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "W"], ["y"])],
    "layer",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, (64, 64))],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, (64, 32))],
    [numpy_helper.from_array(weight, "W")],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "layer.onnx")
converter = os.path.join(os.path.dirname(sys.executable), "mnnconvert")


def converted(*options):
    """The size of the file that mnnconvert writes, and the weight as it computes with it."""
    command = [converter, "-f", "ONNX", "--modelFile", "layer.onnx", "--MNNModel", "layer.mnn", "--bizCode", "layer"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    model = MNN.nn.load_module_from_file("layer.mnn", ["x"], ["y"])
    identity = MNN.expr.const(np.eye(64).flatten().tolist(), [64, 64], MNN.expr.NCHW)
    return os.path.getsize("layer.mnn"), np.array(model.forward(identity).read()).reshape(64, 32)


help_text = " ".join(subprocess.run([converter, "--help"], capture_output=True, text=True).stdout.split())
start = help_text.index("the default weight-quant uses")
print("mnn", version("mnn"), "says:", help_text[start : start + 190])
seen = {}
for name, options in {
    "float": (),
    "8 bits": ("--weightQuantBits", "8"),
    "8 bits, asymmetric flag": ("--weightQuantBits", "8", "--weightQuantAsymmetric"),
    "8 bits, asymmetric false": ("--weightQuantBits", "8", "--weightQuantAsymmetric=false"),
}.items():
    size, values = converted(*options)
    seen[name] = (size, float((values == 0).mean()), float(np.abs(values[weight == 0]).max()))
    print(f"{name}: {size} bytes, zeros {seen[name][1]:.3f}, largest value of a pruned weight {seen[name][2]:.5f}")
assert help_text[start:].startswith("the default weight-quant uses SYMMETRIC"), "this has changed"
assert seen["float"][1] > 0.89 and seen["8 bits, asymmetric flag"][1] > 0.89, "this has changed"
assert seen["8 bits"][1] < 0.3 and seen["8 bits"][2] > 1e-4, "this has changed"
assert seen["8 bits, asymmetric flag"] == seen["8 bits, asymmetric false"], "this has changed"
assert seen["8 bits"][0] > seen["8 bits, asymmetric flag"][0], "this has changed"
print("as described")
PY
