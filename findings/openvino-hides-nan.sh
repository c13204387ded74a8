#!/usr/bin/env bash
# Guess:    a NaN in a network, from a damaged weight or a pruned norm, reaches the output in OpenVINO as in onnxruntime and
#           torch.
# Happens:  on x86 OpenVINO's ReLU and Celu make 0 of it, Clip the lower bound, HardSigmoid 1, Max and Min the other operand. A
#           classifier with a row of NaN in its hidden layer gives finite scores, as if the unit were not there, and no test for
#           NaN in the outputs finds it. onnxruntime keeps the NaN in all of them.
# Seen with openvino 2026.4.1, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6, x86-64 CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 packaging onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper

nan = np.float32("nan")


def outputs(nodes, x, weights):
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    ends.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "nan", ends[:1], ends[1:], stored)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return onnxruntime.InferenceSession(file).run(None, {"x": x})[0], compiled(x)[0]


print("openvino", openvino.__version__, "onnxruntime", onnxruntime.__version__)
x = np.array([[1, nan, -2, 3, 4, 5, 6, 7]], np.float32)
bounds = {"low": np.float32(-1), "high": np.float32(2)}
cases = {name: (["x"], {}) for name in ("Relu", "Celu", "HardSigmoid")}
cases |= {"Clip": (["x", "low", "high"], bounds), "Max": (["x", "low"], bounds), "Min": (["x", "high"], bounds)}
for name, (inputs, weights) in cases.items():
    used = {key: value for key, value in weights.items() if key in inputs}
    kept, hidden = outputs([helper.make_node(name, inputs, ["y"])], x, used)
    print(f"{name} of NaN: onnxruntime {kept[0, 1]}, openvino {hidden[0, 1]}")
    assert np.isnan(kept[0, 1])
    assert np.isfinite(hidden).all(), "this has changed"
generator = np.random.default_rng(0)
first, second = (generator.standard_normal(shape).astype(np.float32) for shape in ((8, 16), (16, 3)))
first[:, 5] = nan
nodes = [
    helper.make_node("MatMul", ["x", "first"], ["hidden"]),
    helper.make_node("Relu", ["hidden"], ["active"]),
    helper.make_node("MatMul", ["active", "second"], ["y"]),
]
clean = np.ones((1, 8), np.float32)
kept, hidden = outputs(nodes, clean, {"first": first, "second": second})
expected = np.maximum(np.nan_to_num(clean @ first), 0) @ second
print("network with a unit of NaN: onnxruntime", kept.tolist(), "openvino", hidden.tolist())
assert np.isnan(kept).all()
assert np.allclose(hidden, expected, atol=1e-4), "this has changed"
print("as described")
PY
