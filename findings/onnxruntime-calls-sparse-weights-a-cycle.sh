#!/usr/bin/env bash
# Guess:    `onnxruntime.quantization.quant_pre_process`, the step that onnxruntime advises before quantization, takes what an
#           onnxruntime session takes, weights stored as `sparse_initializer` included, or says that it does not.
# Happens:  a session runs the model; `quant_pre_process` refuses it as an "Invalid model with cyclic graph", though nothing in it
#           is a cycle: the sparse weight is missing from the names that its sort of the nodes starts from.
# Seen with onnxruntime 1.32.0, onnx 1.23.2, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 sympy==1.14.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.shape_inference import quant_pre_process

weight = np.diag(np.arange(1, 5, dtype=np.float32))
places = np.flatnonzero(weight).astype(np.int64)
values = numpy_helper.from_array(weight.reshape(-1)[places], "W")
sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(places, "places"), weight.shape)
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "W"], ["y"])],
    "product",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 4))],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 4))],
    sparse_initializer=[sparse],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "sparse.onnx")
x = np.ones((2, 4), np.float32)
assert np.array_equal(onnxruntime.InferenceSession("sparse.onnx").run(None, {"x": x})[0], x @ weight)
try:
    quant_pre_process("sparse.onnx", "prepared.onnx")
    said = "taken"
except Exception as error:
    said = str(error)
print("onnxruntime", onnxruntime.__version__, "quant_pre_process:", said)
assert "cyclic" in said, "this has changed"
print("as described")
PY
