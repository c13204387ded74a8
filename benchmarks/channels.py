"""Whole units: how much of the zoo can be cut to half of its multiply-accumulates, how well, how fast, and what for.

    python benchmarks/channels.py zoo [--ways growfx torch-pruning] [--models NAME ...] [--again] [--json FILE]
    python benchmarks/channels.py speed [--json FILE]
    python benchmarks/channels.py plan [--json FILE]

`zoo`: the models of `channels_models.txt` (200 classification models of timm and torchvision below 60M parameters, in
alphabetical strides, random weights), each in a process of its own: planned for half of the multiply-accumulates (at
most 4 % below), cut, and compared with the network whose weights are zero there (error over the largest output, 1e-4).
Images have 96 pixels where the model takes that size, else its own; a model may take 600 s of processor time. The file
is written after every model, and what it has is not done again. Torch-Pruning does the same where it is installed
(`channels_peer.py` says how).
`speed`: processor time of the dense and of the cut model in torch eager and in ONNX Runtime, batch 1 and 16, 224
pixels, one thread, minima of runs in turn.
`plan`: seconds of processor time of `growfx.plan_channels` on resnet50 at 224 pixels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from channels_zoo import FRACTION, WAYS, build, zoo
from machine import describe
from torch import Tensor, nn

import growfx
from growfx.runtime.timing import interleaved_minima

RESULTS = Path(__file__).with_name("results")
SPEED = ("resnet50", "convnext_tiny", "deit_small_patch16_224")
SECONDS = 20  # of each comparison, at least four rounds


def thread_time() -> float:
    """Processor time of this thread, in seconds."""
    return time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)


def session(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    """A call of the model by ONNX Runtime on one thread, on these images."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = growfx.export_onnx(model, Path(folder) / "model.onnx", example_inputs=images, batch=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        runner = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    feed = {runner.get_inputs()[0].name: images.numpy()}
    return lambda: runner.run(None, feed)


def eager(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    """A call of the model by torch."""

    def call() -> Any:
        with torch.no_grad():
            return model(images)

    return call


RUNTIMES = {"torch eager": eager, "onnxruntime": session}


def halved(name: str) -> tuple[nn.Module, nn.Module, float]:
    """A model, the same at half of its multiply-accumulates with widths that are multiples of 8, and its share."""
    model = build(name)
    net = growfx.wrap(model, torch.randn(1, 3, 224, 224)).eval()
    plan = growfx.plan_channels(net, f"flops={FRACTION}", round_to=8)
    net.set_masks(plan.masks(net))
    return model, growfx.unwrap(net, compact=True), plan.share("flops")


def speed(out: Path | None) -> dict[str, Any]:
    """Times of dense and cut models on one thread; written to `out` after each."""
    torch.set_num_threads(1)
    facts: dict[str, Any] = {"machine": describe(), "clock": "processor time of one thread", "rows": []}
    for name in SPEED:
        model, small, share = halved(name)
        for runtime, prepare in RUNTIMES.items():
            for batch in (1, 16):
                images = torch.randn(batch, 3, 224, 224)
                calls = {"dense": prepare(model, images), "half": prepare(small, images)}
                times = interleaved_minima(calls, least_rounds=4, seconds=SECONDS, clock=thread_time)
                row = {"model": name, "runtime": runtime, "batch": batch, "flops": share}
                row |= {"dense_ms": times["dense"] / 1e3, "half_ms": times["half"] / 1e3}
                row["times_faster"] = times["dense"] / times["half"]
                facts["rows"].append(row)
                print(row, flush=True)
                if out is not None:
                    out.write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def plan() -> dict[str, Any]:
    """CPU seconds of planning resnet50 on one thread."""
    torch.set_num_threads(1)
    net = growfx.wrap(build("resnet50"))
    seconds = []
    for _ in range(7):
        begun = time.process_time()
        growfx.plan_channels(net, f"flops={FRACTION}")
        seconds.append(time.process_time() - begun)
    print(seconds)
    return {"machine": describe(), "resnet50_cpu_seconds": seconds, "least": min(seconds)}


def main() -> None:
    """Measure and print; write a JSON file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("zoo", "speed", "plan"))
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=["growfx"])
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--again", action="store_true", help="also models that failed before")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.part == "zoo":
        zoo(options.ways, options.json or RESULTS / "channels_zoo.json", options.models, options.again)
        return
    facts = speed(options.json) if options.part == "speed" else plan()
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
