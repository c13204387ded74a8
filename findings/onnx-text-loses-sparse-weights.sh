#!/usr/bin/env bash
# Guess:    `onnx.printer.to_text` and `onnx.parser.parse_model` are inverse to each other: a model with a weight stored as
#           `sparse_initializer`, which the checker accepts and onnxruntime runs, is the same model after both.
# Happens:  the text does not mention the weight and nothing is said. What is parsed from it has a node that reads `W`, no `W`,
#           and no error is raised before a runtime refuses the model. `version_converter.convert_version` raises a
#           `ConvertError` on the model ("Input W is undefined!"), and `ReferenceEvaluator` a `ValueError`.
# Seen with onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6, Python 3.11: sparse weights travel through protobuf files only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnx.reference import ReferenceEvaluator

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

onnx.checker.check_model(model)
session = onnxruntime.InferenceSession(model.SerializeToString())
assert np.array_equal(session.run(None, {"x": x})[0], x @ weight)

text = onnx.printer.to_text(model)
back = onnx.parser.parse_model(text)
print("onnx", onnx.__version__)
print(text)
print("sparse weights: before", len(model.graph.sparse_initializer), "after", len(back.graph.sparse_initializer))
assert (len(back.graph.sparse_initializer), len(back.graph.initializer)) == (0, 0), "this has changed"


def error_of(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


refused = error_of(lambda: onnxruntime.InferenceSession(back.SerializeToString()))
converted = error_of(lambda: version_converter.convert_version(model, 21))
evaluated = error_of(lambda: ReferenceEvaluator(model).run(None, {"x": x}))
print("runtime on what was parsed:", refused)
print("converter:", converted)
print("reference:", evaluated)
assert "'W'" in refused, "this has changed"
assert converted.startswith("ConvertError"), "this has changed"
assert evaluated.startswith("ValueError"), "this has changed"
print("as described")
PY
