"""A whole training step with sparse kernels over the dense step: forward, loss, backward, SGD with momentum.

    python benchmarks/train_speed.py [--case MODEL:BATCH:PIXELS ...] [--density 0.01 0.05 0.1 0.2] [--threads 1]
                                     [--peer compiled bf16 present sparseprop] [--rounds 6] [--json FILE]

Masks are random ERK masks of exactly the density, seed 0. "dense" is the same model without masks, eager, in float32,
contiguous or channels_last, whichever is faster; "masked" the masked network without kernels; "auto" is
`growfx.use_kernels(net, "auto")`, "present" (where asked for) the same with `storage="present"`. All variants of a
case take turns in one process; reported are the least and the median time of a step. Of one thread that is CPU time,
which others on the machine do not change; of more it is wall time. Peers: the dense model under torch.compile, and
under bfloat16 autocast, and SparseProp's own layers where that package is installed, with the same masks and optimizer.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from machine import describe
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from wide_resnet import wrn_16_2

import growfx

CASES = ("resnet50:32:64", "resnet18:128:32", "wrn_16_2:128:32", "vit_small_patch16_224:32:64")
GOALS = {  # largest time over dense, by density
    "resnet50": {0.01: 0.25, 0.05: 0.36, 0.1: 0.45, 0.2: 0.65},
    "resnet18": {0.01: 0.25, 0.05: 0.36, 0.1: 0.45, 0.2: 0.65},
    "wrn_16_2": {0.01: 0.25, 0.05: 0.36, 0.1: 0.45, 0.2: 0.65},
    "vit_small_patch16_224": {0.01: 0.35, 0.05: 0.45, 0.1: 0.60, 0.2: 0.80},
}
Step = Callable[[], Any]


def build(name: str, pixels: int) -> nn.Module:
    """The model `name` for images of `pixels`, with 10 classes."""
    if name == "wrn_16_2":
        return wrn_16_2()
    sizes = {"img_size": pixels} if "vit" in name else {}
    return timm.create_model(name, num_classes=10, **sizes)


def trainer(net: nn.Module, images: Tensor, targets: Tensor, *, half: bool = False) -> Step:
    """A step of training that can be called again and again."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = F.cross_entropy(net(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dense_steps(model: nn.Module, images: Tensor, targets: Tensor, peers: list[str]) -> dict[str, Step]:
    """Steps of the plain model, by variant."""

    def plain() -> nn.Module:
        return copy.deepcopy(model).train()

    last = torch.channels_last
    steps = {"contiguous": trainer(plain(), images, targets)}
    steps["channels_last"] = trainer(plain().to(memory_format=last), images.to(memory_format=last), targets)
    if "compiled" in peers:
        steps["compiled"] = trainer(torch.compile(plain()), images, targets)  # type: ignore[arg-type]
    if "bf16" in peers:
        steps["bf16"] = trainer(plain(), images, targets, half=True)
    return steps


def sparseprop_step(net: growfx.MaskedGraph, images: Tensor, targets: Tensor) -> Step | None:
    """A step with SparseProp's layers; None where it is not installed."""
    if importlib.util.find_spec("sparseprop") is None:
        return None
    from sparseprop.utils import swap_modules_with_sparse

    model = growfx.unwrap(copy.deepcopy(net)).train()
    return trainer(swap_modules_with_sparse(model, images.shape, inplace=True), images, targets)


def take_turns(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Least and median milliseconds of each step, one round of all after another."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        print(f"  {name}: warm-up", file=sys.stderr)
        for _ in range(2):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            taken[name].append((clock() - start) * 1e3)
    return {name: {"least_ms": min(t), "median_ms": statistics.median(t)} for name, t in taken.items()}


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """All variants of one case: times, and which layers took sparse kernels."""
    name, batch, pixels = case.split(":")
    torch.manual_seed(0)
    model, images = build(name, int(pixels)), torch.randn(int(batch), 3, int(pixels), int(pixels))
    targets = torch.randint(0, 10, (int(batch),))
    steps, taken = dense_steps(model, images, targets, options.peer), {}
    for density in options.density:
        net = growfx.wrap(copy.deepcopy(model), images[:2], density=density, seed=0).train()
        steps[f"masked {density:g}"] = trainer(copy.deepcopy(net), images, targets)
        peer = sparseprop_step(net, images, targets) if "sparseprop" in options.peer else None
        if peer is not None:
            steps[f"sparseprop {density:g}"] = peer
        growfx.use_kernels(net, "auto", example_inputs=images)
        steps[f"auto {density:g}"] = trainer(net, images, targets)
        if "present" in options.peer:
            kept = copy.deepcopy(net)
            growfx.use_kernels(kept, "auto", storage="present", example_inputs=images)
            steps[f"present {density:g}"] = trainer(kept, images, targets)
        layers = net.kernel_report.layers.values()
        taken[f"{density:g}"] = {"sparse": sum(layer.kernel == "sparse" for layer in layers), "layers": len(layers)}
    times = take_turns(steps, options.rounds)
    dense = min(times["contiguous"]["least_ms"], times["channels_last"]["least_ms"])
    for row in times.values():
        row["over_dense"] = row["least_ms"] / dense
    return {"case": case, "threads": torch.get_num_threads(), "dense_ms": dense, "steps": times, "kernels": taken}


def table(result: dict[str, Any]) -> str:
    """The goal table of one case."""
    goals = GOALS.get(result["case"].split(":")[0], {})
    rows = []
    for name, row in result["steps"].items():
        kind, _, density = name.partition(" ")
        goal = goals.get(float(density)) if kind == "auto" else None
        verdict = "" if goal is None else f"{goal:g} {'reached' if row['over_dense'] <= goal else 'missed'}"
        rows.append([name, row["least_ms"], row["median_ms"], row["over_dense"], verdict])
    return tabulate(rows, ["step", "least ms", "median ms", "over dense", "goal"], floatfmt=("", ".1f", ".1f", ".3f"))


def main() -> None:
    """Measure the cases and print their tables; the file is written after every case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", nargs="+", default=list(CASES))
    parser.add_argument("--density", nargs="+", type=float, default=[0.01, 0.05, 0.1, 0.2])
    parser.add_argument("--peer", nargs="*", default=["bf16", "sparseprop"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for case in options.case:
        results.append(measure(case, options))
        print(f"\n{case}, {options.threads} threads\n{table(results[-1])}", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"machine": describe(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
