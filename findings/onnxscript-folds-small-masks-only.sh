#!/usr/bin/env bash
# Guess:    onnxscript's optimizer, which `torch.onnx.export(..., optimize=True)` runs, folds the product of two stored tensors
#           whatever their size. So a model pruned by `torch.nn.utils.prune` (weight = weight_orig * weight_mask, not made
#           permanent) is exported with one tensor a layer.
# Happens:  tensors above a limit are left alone: a mask over 64 x 64 weights is folded, one over 128 x 128 is not. Layers of real
#           size keep weight_orig, dense, weight_mask as floats, and a Mul at each call: twice the bytes of the unpruned file, with
#           weights in it that the mask removes. A test on a small layer does not show it. Raising `input_size_limit` and
#           `output_size_limit` folds them.
# Seen with onnxscript 0.7.2, onnx 1.23.2, Python 3.11; from `torch.onnx.export` of torch 2.15.0 too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import onnxscript
from onnx import TensorProto, helper, numpy_helper
from onnxscript import optimizer


def pruned_layer(size):
    draws = np.random.default_rng(0)
    weight = draws.standard_normal((size, size), dtype=np.float32)
    mask = (draws.random((size, size)) < 0.1).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["weight_orig", "weight_mask"], ["weight"]), helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, size))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, size))],
        [numpy_helper.from_array(weight, "weight_orig"), numpy_helper.from_array(mask, "weight_mask")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def seen(size, **limits):
    model = optimizer.optimize(pruned_layer(size), **limits)
    kinds = [node.op_type for node in model.graph.node]
    print(f"{size} x {size}", limits or "", kinds, len(model.graph.initializer), "tensors", model.ByteSize(), "bytes")
    return kinds, len(model.graph.initializer)


print("onnxscript", onnxscript.__version__)
assert seen(64) == (["MatMul"], 1), "this has changed"
assert seen(128) == (["Mul", "MatMul"], 2), "this has changed"
assert seen(128, input_size_limit=2**20, output_size_limit=2**20) == (["MatMul"], 1), "this has changed"
print("as described")
PY
