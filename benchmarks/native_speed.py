"""The native runtime over the dense runtimes that people deploy, float32, in turns, minima.

    python benchmarks/native_speed.py [--models resnet50 ...] [--densities 0.01 0.05 0.1] [--batch 1] [--threads 1]
        [--out FILE]

Random ERK masks of each density; onnxruntime and, where it is installed, OpenVINO compute the network at the last of
them, densely, once for each model in the same turns. Outputs of that one are compared before anything is timed. One
thread is measured by its CPU time, which other work on the machine hardly changes; several by wall time, which wants a
machine with nothing else at work. Needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

import growfx
from growfx.commands.bench.peers import OnnxSession, OpenVino, peer_versions
from growfx.deploy.native.export import native_plan
from growfx.passes.lower.plan.file import network_bytes
from growfx.runtime.native.library import NativeNetwork, library_status

MODELS = ("resnet50", "mobilenetv3_large_100", "efficientnet_b0", "vit_small_patch16_224", "convnext_tiny")
ROUNDS, SECONDS = 6, 30.0


def dense_runtimes(net: growfx.MaskedGraph, batch: int, threads: int) -> dict[str, Callable[[torch.Tensor], Any]]:
    """The peers that are installed, by name; each takes images and returns the outputs."""
    example = torch.zeros(batch, *net.example().args[0].shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        file = growfx.export_onnx(net, Path(folder) / "net.onnx", example_inputs=example, batch=False)
        found: dict[str, Callable[[torch.Tensor], Any]] = {"onnxruntime": OnnxSession(file, threads)}
        if find_spec("openvino"):
            found["openvino"] = OpenVino(file, threads, "f32")
        return found


def minima(calls: dict[str, Callable[[], object]], clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each call: the least of many, in turns."""
    least = dict.fromkeys(calls, float("inf"))
    begun, rounds = time.monotonic(), 0
    while rounds < ROUNDS or time.monotonic() - begun < SECONDS:
        for name, call in calls.items():
            before = clock()
            call()
            least[name] = min(least[name], 1000 * (clock() - before))
        rounds += 1
    return least


def measured(name: str, densities: list[float], batch: int, threads: int) -> dict[str, Any]:
    """Milliseconds of the dense runtimes, and of the native runtime by density."""
    torch.manual_seed(0)
    nets = [growfx.wrap(growfx.create_model(name), density=density).eval() for density in densities]
    x = torch.randn(batch, *nets[-1].example().args[0].shape[1:])
    networks = [NativeNetwork(network_bytes(native_plan(net)), threads) for net in nets]
    calls: dict[str, Callable[[], object]] = {
        f"{density}": lambda network=network: network(x) for density, network in zip(densities, networks, strict=True)
    }
    peers = dense_runtimes(nets[-1], batch, threads)
    errors: dict[str, float] = {}
    for peer, compute in peers.items():
        expected, got = compute(x).numpy(), networks[-1](x)[0].numpy()
        errors[peer] = float(np.abs(got - expected).max() / np.abs(expected).max())
        if errors[peer] > 1e-3:
            raise SystemExit(f"{name}: outputs differ from those of {peer} by {errors[peer]:.1e}")
    dense = {peer: lambda compute=compute: compute(x) for peer, compute in peers.items()}
    times = minima({**dense, **calls}, time.process_time if threads == 1 else time.perf_counter)
    best = min(peers, key=times.__getitem__)

    def over(peer: str) -> dict[str, float]:
        return {density: round(times[peer] / times[density], 2) for density in calls}

    facts = {"model": name, "batch": batch, "threads": threads, "milliseconds": times}
    return facts | {"speed": over("onnxruntime"), "best_peer": best, "over_best": over(best), "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.01, 0.05, 0.1])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/native_speed.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if reason := library_status():
        raise SystemExit(f"no native runtime: {reason}")
    clock = "CPU time of one thread" if options.threads == 1 else f"wall time of {options.threads} threads"
    found: list[dict[str, Any]] = []
    for name in options.models:
        found.append(measured(name, options.densities, options.batch, options.threads))
        print(json.dumps(found[-1]), flush=True)
        facts = {**describe(), **peer_versions(), "threads": options.threads, "clock": clock}
        options.out.write_text(json.dumps({"machine": facts, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
