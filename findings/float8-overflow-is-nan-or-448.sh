#!/usr/bin/env bash
# Guess:    a weight of 500 in float8 (e4m3fn, whose largest value is 448) becomes 448, as jax cuts off what is too large for
#           int4 and float4, and in ONNX because Cast saturates by default; at least one model means one thing in all runtimes.
# Happens:  numpy and jax make NaN of everything past 464. onnx's reference and onnxruntime make 448. OpenVINO reads the same
#           Cast, saturate=1 written out, and makes NaN; in e5m2 infinity, where the others have 57344. One weight that is too
#           large makes all outputs that read it NaN. Nothing is said anywhere.
# Seen with jax 0.10.2, openvino 2026.4.1, onnxruntime 1.32.0, onnx 1.23.2, ml_dtypes 0.6.0, numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 openvino==2026.4.1 packaging onnxruntime==1.32.0 onnx==1.23.2 \
    ml_dtypes==0.6.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

weight = np.array([440, 460, 500, -500, 1e6], np.float32)
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, weight.shape) for name in "xy"]


def through(kind):
    """Outputs of the model that casts to a float8 and back, by runtime."""
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=kind, saturate=1),
        helper.make_node("Cast", ["narrow"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "narrow", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    core = openvino.Core()
    file = model.SerializeToString()
    return {
        "onnx reference": ReferenceEvaluator(model).run(None, {"x": weight})[0],
        "onnxruntime": onnxruntime.InferenceSession(file).run(None, {"x": weight})[0],
        "openvino": core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(weight)[0],
    }


print("jax", jax.__version__, "openvino", openvino.__version__, "onnxruntime", onnxruntime.__version__)
limits = {"e4m3fn": 448, "e5m2": 57344}
for name, limit in limits.items():
    dtype = getattr(ml_dtypes, f"float8_{name}")
    seen = through(getattr(TensorProto, f"FLOAT8{name.upper()}"))
    with np.errstate(all="ignore"):
        seen["numpy"] = weight.astype(dtype).astype(np.float32)
    seen["jax"] = np.asarray(jnp.asarray(weight).astype(dtype).astype(jnp.float32))
    for way, values in seen.items():
        print(f"{name}, {way}: {values.tolist()}")
    for way, values in seen.items():
        overflowing = values[np.abs(weight) > limit * 1.1]
        if way in ("onnx reference", "onnxruntime"):
            assert (np.abs(overflowing) == limit).all(), "this has changed"
        else:
            assert len(overflowing) and (np.isnan(overflowing) if limit == 448 else np.isinf(overflowing)).all(), "changed"
for dtype in ("int4", "float4_e2m1fn"):
    print(f"jax, 500 in {dtype}:", jnp.asarray([500.0]).astype(dtype))
    assert float(jnp.asarray([500.0]).astype(dtype)[0]) in (6, 7)
print("as described")
PY
