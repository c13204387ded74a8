"""Whole units: how much of the zoo can be cut to half of its multiply-accumulates, how well, how fast, and what for.

    python benchmarks/channels.py zoo [--stride 1] [--peers DIR] [--json benchmarks/results/channels_zoo.json]
    python benchmarks/channels.py speed [--json benchmarks/results/channels_speed.json]
    python benchmarks/channels.py plan [--json ...]

`zoo`: the models of `channels_models.txt` (200 classification models of timm and torchvision below 60M parameters, in
alphabetical strides, random weights), each in a process of its own: planned for half of the multiply-accumulates (at
most 4 % below), cut, and compared with the network whose weights are zero there (error over the largest output, 1e-4).
Torch-Pruning does the same where it is installed (`pip install --target DIR torch-pruning`, `--peers DIR`): group
magnitude, global, coupled groups by its own dependency graph, the output layer left alone, its number of heads given;
what it removes is not zeroed first, so that only what runs and what it costs is compared.
`speed`: processor time of the dense and of the cut model in torch eager, batch 1 and 16, one thread, minima in turn.
`plan`: seconds of CPU time of `growfx.plan_channels` on resnet50.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import growfx
from growfx.runtime.timing import interleaved_minima

MODELS = Path(__file__).with_name("channels_models.txt")
SPEED = ("resnet50", "convnext_tiny", "deit_small_patch16_224")
FRACTION, SLACK, SAME = 0.5, 0.04, 1e-4
PATIENCE = 900  # seconds for one model


def build(name: str) -> nn.Module:
    """The model with random weights in evaluation mode; nothing in it starts at zero, so that no path is silent."""
    torch.manual_seed(0)
    model = growfx.create_model(name).eval()
    for parameter in model.parameters():
        if not bool(parameter.any()) or bool((parameter == parameter.flatten()[0]).all()):
            torch.nn.init.uniform_(parameter, 0.2, 0.7)
    return model


def macs(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Multiply-accumulates of one call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() / 2


def first(output: Any) -> torch.Tensor:
    """The logits among what a model returns."""
    while not isinstance(output, torch.Tensor):
        output = output[0] if isinstance(output, (tuple, list)) else next(iter(output.values()))
    return output


def ours(name: str) -> dict[str, Any]:
    """What growfx makes of a model."""
    model = build(name)
    net = growfx.wrap(model).eval()
    inputs = net.example_inputs()
    dense = macs(model, inputs)
    begun = time.process_time()
    plan = growfx.plan_channels(net, f"flops={FRACTION}")
    seconds = time.process_time() - begun
    net.set_masks(plan.masks(net))
    small = growfx.unwrap(net, compact=True)
    with torch.no_grad():
        expected, got = first(net(*inputs)), first(small(*inputs))
    error = float((got - expected).abs().max() / expected.abs().max())
    share = macs(small, inputs) / dense
    good = FRACTION - SLACK <= share <= FRACTION + 1e-6 and error <= SAME
    reason = "" if good else f"{share:.3f} of the multiply-accumulates, error {error:.1e}"
    params = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    return {"good": good, "share": share, "params": params, "error": error, "plan_seconds": seconds, "reason": reason}


def theirs(name: str) -> dict[str, Any]:
    """What Torch-Pruning makes of a model: the smallest ratio of channels that halves the multiply-accumulates."""
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]

    share, begun = 1.0, time.process_time()
    for ratio in (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6):
        model = build(name)
        inputs = growfx.wrap(build(name)).example_inputs()
        dense = macs(model, inputs)
        heads = {
            module.qkv: module.num_heads
            for module in model.modules()
            if hasattr(module, "qkv") and hasattr(module, "num_heads")
        }
        classes = first(model(*inputs)).shape[-1]
        ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
        pruner = tp.pruner.MetaPruner(
            model,
            inputs[0],
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=False,
            pruning_ratio=ratio,
            ignored_layers=ignored,
            num_heads=heads,
        )
        pruner.step()
        module: Any
        for module in model.modules():
            if getattr(module, "qkv", None) in pruner.num_heads:
                module.num_heads = pruner.num_heads[module.qkv]
                module.head_dim = module.qkv.out_features // 3 // module.num_heads
        with torch.no_grad():
            model(*inputs)
        share = macs(model, inputs) / dense
        if share <= FRACTION:
            break
    good = share <= FRACTION
    reason = "" if good else f"{share:.3f} of the multiply-accumulates at most"
    return {"good": good, "share": share, "plan_seconds": time.process_time() - begun, "reason": reason}


def alone(kind: str, name: str, peers: str) -> dict[str, Any]:
    """The facts of one model, found in a process of its own."""
    command = [sys.executable, __file__, "one", kind, name, "--peers", peers]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return {"good": False, "reason": f"no result within {PATIENCE} s"}
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        last = (run.stderr.strip().splitlines() or ["no output"])[-1]
        return {"good": False, "reason": without_places(last)[:300]}
    return json.loads(lines[-1])


def without_places(text: str) -> str:
    """A message without the folders of this machine."""
    return " ".join(word.rpartition("/site-packages/")[2] for word in text.split(" "))


def zoo(stride: int, offset: int, peers: str, out: Path | None) -> dict[str, Any]:
    """All models of the list, or each `stride`-th, by growfx and by the peers that are there.

    What is known is written to `out` after each model.
    """
    names = MODELS.read_text().split()[offset::stride]
    facts: dict[str, Any] = {"machine": describe(), "stride": stride, "growfx": {}}
    kinds = {"growfx": "ours", **({"torch-pruning": "theirs"} if peers else {})}
    for name in names:
        for label, kind in kinds.items():
            found = facts.setdefault(label, {})
            found[name] = alone(kind, name, peers)
            print(label, name, found[name], file=sys.stderr, flush=True)
            facts[f"{label} share"] = sum(fact["good"] for fact in found.values()) / len(found)
            if out is not None:
                out.write_text(json.dumps(facts, indent=1) + "\n")
    for label in kinds:
        print(f"{label}: {facts[f'{label} share']:.1%} of {len(names)} cut to half of their multiply-accumulates")
    return facts


def speed(out: Path | None) -> dict[str, Any]:
    """Times of dense and cut models in torch eager on one thread; written to `out` after each."""
    torch.set_num_threads(1)
    facts: dict[str, Any] = {"machine": describe(), "eager": {}}
    for name in SPEED:
        model = build(name)
        net = growfx.wrap(model).eval()
        plan = growfx.plan_channels(net, f"flops={FRACTION}", round_to=8)
        net.set_masks(plan.masks(net))
        small = growfx.unwrap(net, compact=True)
        for batch in (1, 16):
            images = torch.randn(batch, 3, 224, 224)
            calls: dict[str, Callable[[], Any]] = {"dense": lambda: model(images), "half": lambda: small(images)}  # noqa: B023
            with torch.no_grad():
                times = interleaved_minima(
                    calls, least_rounds=4, seconds=10, clock=lambda: time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
                )
            row = {"dense_ms": times["dense"] / 1e3, "half_ms": times["half"] / 1e3}
            row |= {"times_faster": times["dense"] / times["half"], "flops": plan.share("flops")}
            facts["eager"][f"{name}, batch {batch}"] = row
            print(name, batch, row, flush=True)
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
    parser.add_argument("part", choices=("zoo", "speed", "plan", "one"))
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--peers", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)
    if options.part == "one":
        torch.set_num_threads(1)
        kind, name = options.rest
        print(json.dumps((ours if kind == "ours" else theirs)(name)))
        return
    facts = {
        "zoo": lambda: zoo(options.stride, options.offset, options.peers, options.json),
        "speed": lambda: speed(options.json),
        "plan": plan,
    }[options.part]()
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
