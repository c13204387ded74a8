#!/usr/bin/env bash
# Guess:    onnx.version_converter.convert_version rewrites a model for another opset so that it computes the same, or raises for
#           what it cannot rewrite: where a newer version of an operator has another meaning it has an adapter.
# Happens:  Softmax and LogSoftmax of opset 11 become a flattening, a Softmax and a reshaping in opset 13. Hardmax, which changed
#           in the same way, only gets the new number. A linear Resize or Upsample of opset 10 or 9 gets other sample points: it
#           becomes a Resize with the default half_pixel, where the old one was asymmetric. Down from 13 to 11 a Softmax over a
#           middle axis is taken as it is and means all axes from there. The checker accepts all of these, and nothing is said.
# Seen with onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, checker, helper, numpy_helper, version_converter

generator = np.random.default_rng(0)
scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")


def outputs(model, x):
    checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


def differ(operator, old, new, **attributes):
    """The share of outputs that are others after the conversion."""
    scaled = operator in ("Resize", "Upsample")
    x = generator.standard_normal((1, 2, 4, 4) if scaled else (2, 3, 4)).astype(np.float32)
    node = helper.make_node(operator, ["x", "scales"] if scaled else ["x"], ["y"], **attributes)
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    ends.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * x.ndim))
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], [scales] if scaled else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", old)], ir_version=8)
    before, after = outputs(model, x), outputs(version_converter.convert_version(model, new), x)
    assert before.shape == after.shape
    share = round(float((~np.isclose(before, after, atol=1e-5)).mean()), 2)
    print(f"{operator} {attributes}, opset {old} to {new}: {share:.0%} of the outputs differ")
    return share


print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
assert differ("Softmax", 11, 13, axis=1) == differ("LogSoftmax", 11, 13, axis=1) == 0
assert differ("Resize", 10, 11, mode="nearest") == 0
wrong = [
    differ("Hardmax", 11, 13, axis=1),
    differ("Resize", 10, 11, mode="linear"),
    differ("Upsample", 9, 13, mode="linear"),
    differ("Softmax", 13, 11, axis=1),
]
assert all(share > 0.1 for share in wrong), "this has changed"
print("as described")
PY
