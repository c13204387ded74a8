#!/usr/bin/env bash
# Guess:    `onnxruntime.quantization.quantize_dynamic` quantizes a layer whose weight is the product of two stored tensors (a
#           pruned weight and its mask), or raises.
# Happens:  it leaves the layer in float32 and returns as if all was done; the file has the size it had. What it logs is the same
#           advice to run `quant_pre_process` that it logs for every model. After that step, which folds the product, the layer is
#           quantized.
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
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process

size = 128
draws = np.random.default_rng(0)
weight = draws.standard_normal((size, size), dtype=np.float32)
mask = (draws.random((size, size)) < 0.1).astype(np.float32)


def layer(nodes, tensors):
    graph = helper.make_graph(
        [*nodes, helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("rows", size))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("rows", size))],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def quantized(file):
    quantize_dynamic(file, f"quantized-{file}", weight_type=QuantType.QInt8)
    found = [node.op_type for node in onnx.load(f"quantized-{file}").graph.node]
    print(file, found)
    return "MatMulInteger" in found


print("onnxruntime", onnxruntime.__version__)
product = helper.make_node("Mul", ["orig", "mask"], ["weight"])
onnx.save(layer([], {"weight": weight * mask}), "plain.onnx")
onnx.save(layer([product], {"orig": weight, "mask": mask}), "masked.onnx")
quant_pre_process("masked.onnx", "masked-folded.onnx")
assert quantized("plain.onnx"), "this has changed"
assert not quantized("masked.onnx"), "this has changed"
assert quantized("masked-folded.onnx"), "this has changed"
print("as described")
PY
