#!/usr/bin/env bash
# Guess:    OpenVINO, which has a sparse-weights option for its CPU plugin, reads ONNX models whose weights are stored as
#           `sparse_initializer`, as onnxruntime does.
# Happens:  it takes the weight for missing: "Input tensor isn't found for node". The same model with a dense weight is read.
# Seen with openvino 2026.4.1, onnx 1.23.2, numpy 2.4.6, Python 3.11: a sparse weight has to be written dense for it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 packaging onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper

weight = np.diag(np.arange(1, 5, dtype=np.float32))
places = np.flatnonzero(weight).astype(np.int64)
values = numpy_helper.from_array(weight.reshape(-1)[places], "W")
sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(places, "places"), weight.shape)
x = np.ones((2, 4), np.float32)


def answer(**weights):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 4))],
        **weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, "model.onnx")
    try:
        return openvino.Core().compile_model("model.onnx", "CPU")(x)[0]
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1]


print("openvino", openvino.__version__)
dense = answer(initializer=[numpy_helper.from_array(weight, "W")])
kept = answer(sparse_initializer=[sparse])
print("dense:", dense.tolist())
print("sparse:", kept)
assert np.allclose(dense, x @ weight)
assert isinstance(kept, str) and "isn't found" in kept, "this has changed"
print("as described")
PY
