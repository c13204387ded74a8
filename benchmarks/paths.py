"""A growth round (path products, draw of new edges, masks and optimizer state) over one dense training step.

Rounds and steps alternate in one process and a ratio is taken pair by pair, so that a machine whose speed drifts does
not decide. The step is forward, backward and SGD of the dense model; the round scores a network that starts at the
given density and grows by 1.3. Target: at most 0.25 for resnet50 at batch 32 and 224 pixels; wrapping it: below 2 s.

    python benchmarks/paths.py [--model resnet50] [--batch 32] [--size 224] [--pairs 5] [--device cpu] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from machine import describe
from tabulate import tabulate
from torch import nn

import growfx
from growfx.masked.optimizers import clear_state
from growfx.selection.choose import draw
from growfx.selection.edge_keys import EdgeKeys

GROWTH = 1.3


def seconds(work: Callable[[], object], device: str) -> float:
    """Time of one call, everything queued on the device included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class DenseStep:
    """One training step of the dense model on fixed data."""

    def __init__(self, model: nn.Module, batch: int, size: int, device: str) -> None:
        self.model = model.train().to(device)
        self.x = torch.randn(batch, 3, size, size, device=device)
        self.y = torch.randint(0, 1000, (batch,), device=device)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def run(self) -> None:
        """Forward, backward, SGD."""
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class GrowthRound:
    """Rounds of growth of one masked network in training, with the time of their parts."""

    def __init__(self, net: growfx.MaskedGraph, device: str) -> None:
        self.net, self.device, self.rounds = net.train(), device, 0
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        for layer in net.layers.values():
            self.optimizer.state[layer.parameter]["momentum_buffer"] = torch.ones_like(layer.parameter)
        self.parts: dict[str, list[float]] = {"paths": [], "draw": [], "update": []}

    def run(self) -> None:
        """Score, draw, update."""
        wanted = int((GROWTH - 1) * self.net.nnz)
        start = time.perf_counter()
        paths = growfx.path_products(self.net)
        scored = time.perf_counter()
        absent = {name: ~self.net.layers[name].mask for name in paths.scores}
        chosen = draw(paths.scores, wanted, EdgeKeys(0, f"growth round {self.rounds}"), absent)
        drawn = time.perf_counter()
        self.net.set_masks({name: self.net.layers[name].mask | mask for name, mask in chosen.masks.items()})
        for layer in self.net.layers.values():
            clear_state(self.optimizer, layer.parameter, ~layer.mask)
        assert chosen.count == wanted
        self.rounds += 1
        self.parts["paths"].append(scored - start)
        self.parts["draw"].append(drawn - scored)
        self.parts["update"].append(time.perf_counter() - drawn)


def measure(options: argparse.Namespace) -> dict[str, object]:
    device = options.device
    torch.manual_seed(0)
    # Branches that start at zero would carry no paths yet; a network in training has none.
    model = growfx.create_model(options.model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    example = torch.randn(1, 3, options.size, options.size)
    wrapping = time.perf_counter()
    net = growfx.wrap(model, example, density=options.density)
    wrapping = time.perf_counter() - wrapping
    growth = GrowthRound(net.to(device), device)
    step = DenseStep(growfx.create_model(options.model), options.batch, options.size, device)
    steps, rounds = [], []
    for _ in range(options.pairs + 1):
        steps.append(seconds(step.run, device))
        rounds.append(seconds(growth.run, device))
    steps, rounds = steps[1:], rounds[1:]  # the first of each allocates
    ratios = sorted(a / b for a, b in zip(rounds, steps, strict=True))
    return {
        "model": options.model,
        "batch": options.batch,
        "size": options.size,
        "device": device,
        "pairs": options.pairs,
        "wrap_s": wrapping,
        "dense_step_s": statistics.median(steps),
        "round_s": statistics.median(rounds),
        **{f"{part}_s": statistics.median(times[1:]) for part, times in growth.parts.items()},
        "round_over_step": statistics.median(ratios),
        "lowest_and_highest": [ratios[0], ratios[-1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    result, machine = measure(options), describe()
    print(tabulate(result.items(), floatfmt=".3f"))
    print(machine)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "results": [result]}, file, indent=1)


if __name__ == "__main__":
    main()
