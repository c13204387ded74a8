#!/usr/bin/env bash
# Guess:    `onnx.save_model(..., save_as_external_data=True, size_threshold=0)` writes all weights to the file beside the model,
#           which is what keeps a protobuf file below its limit of 2 GiB.
# Happens:  weights stored as `sparse_initializer` stay inside the model's own file, whatever their size; where there are no others,
#           the file beside it is not even made. An index of 8 bytes a value stays there too.
# Seen with onnx 1.23.2, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

weight = np.diag(np.arange(1, 1001, dtype=np.float32))
places = np.flatnonzero(weight).astype(np.int64)
values = numpy_helper.from_array(weight.reshape(-1)[places], "W")
sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(places, "places"), weight.shape)


def saved(name, **weights):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 1000))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 1000))],
        **weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, f"{name}.onnx", save_as_external_data=True, location=f"{name}.bin", size_threshold=0)
    beside = Path(f"{name}.bin")
    return Path(f"{name}.onnx").stat().st_size, beside.stat().st_size if beside.exists() else None


dense = saved("dense", initializer=[numpy_helper.from_array(weight, "W")])
kept = saved("sparse", sparse_initializer=[sparse])
print("onnx", onnx.__version__, "(bytes of the model, bytes beside it)")
print("dense", dense, "sparse", kept)
assert dense[0] < 1000 and dense[1] == 4_000_000
assert kept[0] > 12 * 1000 and kept[1] is None, "this has changed"
print("as described")
PY
