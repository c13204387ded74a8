#!/usr/bin/env bash
# Guess:    a Softmax in an ONNX model of opset 11 or 12, which flattens its input at the axis and normalizes over all axes from
#           there on, is computed so by OpenVINO and by onnx's own reference evaluator, as onnxruntime does.
# Happens:  both take it for the Softmax of opset 13 and normalize over the one axis: of an attention's scores of shape (2, 3, 4)
#           with axis=1 the outputs of each item add up to 4, not to 1. The reference evaluator also has the new default for the
#           axis, and does so with LogSoftmax and Hardmax; OpenVINO has those right. Nothing is said.
# Seen with openvino 2026.4.1, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 packaging onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, checker, helper
from onnx.reference import ReferenceEvaluator

x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)


def outputs(operator, opset):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in "xy"]
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], axis=1)], "one", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    checker.check_model(model, full_check=True)
    file = model.SerializeToString()
    core = openvino.Core()
    return {
        "onnxruntime": onnxruntime.InferenceSession(file).run(None, {"x": x})[0],
        "openvino": core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0],
        "onnx reference": ReferenceEvaluator(model).run(None, {"x": x})[0],
    }


print("openvino", openvino.__version__, "onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
exponentials = np.exp(x)
flattened = exponentials / exponentials.sum(axis=(1, 2), keepdims=True)
along_axis = exponentials / exponentials.sum(axis=1, keepdims=True)
for opset in (11, 12, 13):
    seen = outputs("Softmax", opset)
    for name, values in seen.items():
        print(f"Softmax of opset {opset}, {name}: sums of the items {values.sum(axis=(1, 2)).round(3).tolist()}")
    right = flattened if opset < 13 else along_axis
    assert np.allclose(seen["onnxruntime"], right, atol=1e-6)
    assert np.allclose(seen["openvino"], along_axis, atol=1e-6), "this has changed"
    assert np.allclose(seen["onnx reference"], along_axis, atol=1e-6), "this has changed"
for operator in ("LogSoftmax", "Hardmax"):
    seen = outputs(operator, 11)
    agree = {name: bool(np.allclose(values, seen["onnxruntime"], atol=1e-5)) for name, values in seen.items()}
    print(f"{operator} of opset 11, same as onnxruntime:", agree)
    assert agree == {"onnxruntime": True, "openvino": True, "onnx reference": False}, "this has changed"
print("as described")
PY
