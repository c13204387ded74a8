#!/usr/bin/env bash
# Guess:    onnx_ir, which torch's exporter and onnxscript's optimizer are built on, reads a model and writes it back whole, or
#           raises for what it cannot hold.
# Happens:  weights stored as `sparse_initializer` are left out. onnx_ir logs one warning that the model it was given is invalid
#           and writes a model without them, which onnxruntime refuses; the original it runs. `onnxscript.optimizer.optimize` does
#           the same.
# Seen with onnx-ir 1.1.0, onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.32.0, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import onnx_ir
import onnxruntime
import onnxscript
from onnx import TensorProto, helper, numpy_helper
from onnxscript import optimizer

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
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
x = np.ones((2, 4), np.float32)
assert np.array_equal(onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0], x @ weight)

print("onnx_ir", onnx_ir.__version__, "onnxscript", onnxscript.__version__)
back = onnx_ir.serde.serialize_model(onnx_ir.serde.deserialize_model(model))
for name, result in (("onnx_ir", back), ("optimizer", optimizer.optimize(model))):
    left = len(result.graph.sparse_initializer) + len(result.graph.initializer)
    try:
        onnxruntime.InferenceSession(result.SerializeToString())
        said = "runs"
    except Exception as error:
        said = str(error)
    print(f"{name}: {left} weights left; onnxruntime: {said}")
    assert left == 0, "this has changed"
    assert "'W'" in said, "this has changed"
print("as described")
PY
