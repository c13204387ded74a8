"""Training step of a masked network over the same network dense: forward, backward and SGD, in one process.

Dense and masked steps alternate; a ratio is taken pair by pair and its median is reported, so that a machine whose
speed drifts does not decide. "dense again" is a second dense network: its ratio shows the noise. Masks are
random ERK masks.

    python benchmarks/step.py [--case resnet50:8:64 ...] [--density 0.1] [--pairs 30] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import timm
import torch
from machine import describe
from tabulate import tabulate
from torch import nn

import growfx

CASES = ("resnet50:8:64", "resnet50:32:64", "vit_tiny_patch16_224:8:224", "vit_tiny_patch16_224:32:224")


def build(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": size} if name.startswith(("vit", "swin", "mixer")) and size != 224 else {}
    return timm.create_model(name, num_classes=100, **options)


class Step:
    """One training step on fixed data."""

    def __init__(self, model: nn.Module, batch: int, size: int):
        self.model = model.train()
        self.x, self.y = torch.randn(batch, 3, size, size), torch.randint(0, 100, (batch,))
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def seconds(self) -> float:
        """Run forward, backward, SGD and zero_grad once."""
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def measure(case: str, density: float, pairs: int, warmup: int = 3) -> dict[str, object]:
    name, batch, size = case.split(":")
    masked = growfx.wrap(build(name, int(size)), torch.randn(1, 3, int(size), int(size)), density=density)
    models = {"dense": build(name, int(size)), "again": build(name, int(size)), "masked": masked}
    steps = {key: Step(model, int(batch), int(size)) for key, model in models.items()}
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for i in range(pairs + warmup):
        for key in sorted(steps, key=lambda k: (hash((i, k)) % 97, k)):
            spent = steps[key].seconds()
            if i >= warmup:
                seconds[key].append(spent)
    masked.verify()
    dense = [(a + b) / 2 for a, b in zip(seconds["dense"], seconds["again"], strict=True)]
    ratios = sorted(m / d for m, d in zip(seconds["masked"], dense, strict=True))
    noise = sorted(a / b for a, b in zip(seconds["again"], seconds["dense"], strict=True))
    return {
        "case": case,
        "density": masked.density,
        "pairs": pairs,
        "dense_ms": 1e3 * statistics.median(seconds["dense"]),
        "masked_ms": 1e3 * statistics.median(seconds["masked"]),
        "masked_over_dense": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "dense_again_over_dense": statistics.median(noise),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="model:batch:pixels, repeatable")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    results = [measure(case, args.density, args.pairs) for case in args.case or CASES]
    machine = describe()
    columns = ["case", "dense_ms", "masked_ms", "masked_over_dense", "quartiles", "dense_again_over_dense"]
    print(tabulate([[r[c] for c in columns] for r in results], headers=columns, floatfmt=".3f"))
    print(machine)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
