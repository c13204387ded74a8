#!/usr/bin/env bash
# Guess:    an inference runtime that takes a numpy array computes with the numbers in it, or raises for a dtype or layout that
#           it has no code for, as torch and jax do for arrays in the other byte order (from IDX, FITS or netCDF files).
# Happens:  onnxruntime (run, OrtValue, IO binding), openvino's Tensor and constant, and ncnn's Mat take ">f4" for float32 and
#           read the bytes as they lie: inputs around 1 become denormal numbers around 1e-41, and nothing is said. openvino's
#           compiled model, called with the array itself, gets it right. ncnn's Mat ignores strides as well: a transposed matrix
#           arrives with its rows and columns mixed up. np.ascontiguousarray(x, "<f4") mends all.
# Seen with onnxruntime 1.32.0, openvino 2026.4.1, ncnn 1.0.20261020, onnx 1.23.2, numpy 2.4.6, Python 3.11, little-endian
# machine.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 openvino==2026.4.1 packaging ncnn==1.0.20261020 \
    onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import ncnn
import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper
from openvino import opset15

ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 3)) for name in "xy"]
graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", ends[:1], ends[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
session = onnxruntime.InferenceSession(model.SerializeToString())
compiled = openvino.Core().compile_model(openvino.Core().read_model(model.SerializeToString()), "CPU")


def bound(array):
    binding = session.io_binding()
    binding.bind_cpu_input("x", array)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()[0] / 2


ways = {
    "onnxruntime run": lambda array: session.run(None, {"x": array})[0] / 2,
    "onnxruntime OrtValue": lambda array: onnxruntime.OrtValue.ortvalue_from_numpy(array).numpy(),
    "onnxruntime IO binding": bound,
    "openvino Tensor": lambda array: openvino.Tensor(array).data,
    "openvino constant": lambda array: opset15.constant(array).data,
    "ncnn Mat": lambda array: np.array(ncnn.Mat(array)),
    "openvino compiled model": lambda array: compiled(array)[0] / 2,
}
values = np.arange(1, 7, dtype="<f4").reshape(2, 3)
layouts = {"big-endian": values.astype(">f4"), "transposed": np.ascontiguousarray(values.T).T}
print("onnxruntime", onnxruntime.__version__, "openvino", openvino.__version__, "ncnn", ncnn.__version__)
wrong = {layout: [] for layout in layouts}
for layout, array in layouts.items():
    assert (array == values).all()
    for name, way in ways.items():
        got = way(array)
        print(f"{name}, {layout}: {got.ravel()[:3].tolist()}")
        if not np.allclose(got, values):
            wrong[layout].append(name)
assert wrong == {"big-endian": list(ways)[:6], "transposed": ["ncnn Mat"]}, "this has changed"
print("as described")
PY
