"""The native runtime over dense ONNX Runtime: CPU time of one thread, float32, in turns, minima.

    python benchmarks/native_speed.py [--models resnet50 ...] [--densities 0.01 0.05 0.1] [--batch 1] [--out FILE]

Random ERK masks of each density; ONNX Runtime computes the network at the last of them, densely, once for each model in
the same turns. Outputs of that one are compared before anything is timed. Needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

import growfx
from growfx.deploy.native.export import native_plan
from growfx.passes.lower.plan.file import network_bytes
from growfx.runtime.native.library import NativeNetwork, library_status

MODELS = ("resnet50", "mobilenetv3_large_100", "efficientnet_b0", "vit_small_patch16_224", "convnext_tiny")
ROUNDS, SECONDS = 6, 30.0


def onnx_session(net: growfx.MaskedGraph, batch: int) -> Any:
    """Dense ONNX Runtime on one thread."""
    import onnxruntime

    example = torch.zeros(batch, *net.example().args[0].shape[1:])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        file = growfx.export_onnx(net, Path(folder) / "net.onnx", example_inputs=example, batch=False)
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def minima(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """CPU milliseconds of each call: the least of many, in turns."""
    least = dict.fromkeys(calls, float("inf"))
    begun, rounds = time.monotonic(), 0
    while rounds < ROUNDS or time.monotonic() - begun < SECONDS:
        for name, call in calls.items():
            before = time.process_time()
            call()
            least[name] = min(least[name], 1000 * (time.process_time() - before))
        rounds += 1
    return least


def measured(name: str, densities: list[float], batch: int) -> dict[str, Any]:
    """CPU milliseconds of ONNX Runtime, and of the native runtime by density."""
    torch.manual_seed(0)
    calls: dict[str, Callable[[], object]] = {}
    for density in densities:
        net = growfx.wrap(growfx.create_model(name), density=density).eval()
        x = torch.randn(batch, *net.example().args[0].shape[1:])
        network = NativeNetwork(network_bytes(native_plan(net)))
        calls[f"{density}"] = lambda network=network, x=x: network(x)
    session = onnx_session(net, batch)
    feed = {session.get_inputs()[0].name: x.numpy()}
    expected, got = session.run(None, feed)[0], network(x)[0].numpy()
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    if error > 1e-3:
        raise SystemExit(f"{name}: outputs differ by {error:.1e}")
    times = minima({"onnxruntime": lambda: session.run(None, feed), **calls})
    speeds = {density: round(times["onnxruntime"] / times[density], 2) for density in calls}
    return {"model": name, "batch": batch, "milliseconds": times, "speed": speeds, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.01, 0.05, 0.1])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/native_speed.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if reason := library_status():
        raise SystemExit(f"no native runtime: {reason}")
    import onnxruntime

    found: list[dict[str, Any]] = []
    for name in options.models:
        found.append(measured(name, options.densities, options.batch))
        print(json.dumps(found[-1]), flush=True)
        facts = {**describe(), "onnxruntime": onnxruntime.__version__, "clock": "CPU time of one thread"}
        options.out.write_text(json.dumps({"machine": facts, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
