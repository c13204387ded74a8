"""How far optimizers move present edges as edges become fewer: over a whole weight, and over present edges alone.

    python benchmarks/optimizer_steps.py [--json FILE]

A linear layer of 256 x 256 with a random mask, a learning rate of 1e-3, no weight decay; the mean distance of present
edges in the fifth of five steps on the same 64 random inputs, towards an output of zero. `storage="present"` takes
optimizers that step each edge by itself.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch
from machine import describe
from tabulate import tabulate
from timm.optim import create_optimizer_v2
from torch import nn

import growfx

OPTIMIZERS, DENSITIES, STEPS = ("adamw", "cadamw", "lamb", "adafactor", "novograd"), (0.99, 0.1, 0.01), 5


def moved(name: str, density: float, storage: str) -> float | None:
    """The mean distance of a step; None where the storage refuses the optimizer."""
    torch.manual_seed(0)
    net = growfx.wrap(nn.Sequential(nn.Linear(256, 256)), torch.randn(2, 256), density=density)
    growfx.use_kernels(net, "dense" if storage == "dense" else "auto", storage=storage)
    optimizer = create_optimizer_v2(net, opt=name, lr=1e-3, weight_decay=0)
    (layer,), images, before = net.layers.values(), torch.randn(64, 256), torch.empty(0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        net(images).square().mean().backward()
        before = layer.weight.detach()[layer.mask].clone()
        try:
            optimizer.step()
        except growfx.errors.ConfigError:
            return None
    return float((layer.weight.detach()[layer.mask] - before).abs().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in OPTIMIZERS:
        for storage in ("dense", "present"):
            steps = [moved(name, density, storage) for density in DENSITIES]
            rows.append({"optimizer": name, "storage": storage, **dict(zip(map(str, DENSITIES), steps, strict=True))})
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2e", missingval="-"))
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
