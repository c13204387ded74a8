#!/usr/bin/env bash
# Guess:    openvino.save_model, which stores weights in float16 unless told otherwise, leaves a tensor in float32 that has
#           values which float16 cannot hold, or says that it changed them.
# Happens:  it does so only for tensors of which at least three quarters are out of range. In others a value of 100,000 or 1e30
#           becomes 65504, a value of 1e-9 zero, an edge that is gone, and nothing is said. compress_to_fp16=False keeps all.
# Seen with openvino 2026.4.1, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 packaging numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import openvino
from openvino import opset15


def stored(weight, **options):
    """The weight as it is in the file, and its type there."""
    x = opset15.parameter([1, weight.shape[0]], np.float32, name="x")
    model = openvino.Model([opset15.matmul(x, opset15.constant(weight), False, False)], [x])
    openvino.save_model(model, "model.xml", **options)
    nodes = openvino.Core().read_model("model.xml").get_ops()
    constants = [node for node in nodes if node.get_type_name() == "Constant" and list(node.get_output_shape(0)) == [8, 8]]
    return constants[0].data.astype(np.float32), constants[0].get_element_type().get_type_name()


weight = np.full((8, 8), 0.5, np.float32)
weight[0, :3] = 100_000, 1e30, 1e-9
mostly_large, half_large = weight.copy(), weight.copy()
mostly_large[:6] = half_large[:4] = 100_000
print("openvino", openvino.__version__)
kept, kind = stored(weight)
print("a few out of range:", kind, kept[0, :4].tolist())
assert kind == "f16" and kept[0, :3].tolist() == [65504, 65504, 0], "this has changed"
half = stored(half_large)
print("half of them:", half[1], half[0][:, 7].tolist())
assert half[1] == "f16" and (half[0][:4] == 65504).all(), "this has changed"
others = {"three quarters of them": stored(mostly_large), "no compression": stored(weight, compress_to_fp16=False)}
for name, seen in others.items():
    print(f"{name}:", seen[1], seen[0][0, :4].tolist())
    assert seen[1] == "f32"
print("as described")
PY
