"""Memory of weights, gradients and optimizer state, with values of present edges only over whole weights.

    python benchmarks/train_memory.py [--model resnet50 vit_small_patch16_224] [--density 0.01 0.05 0.1 0.2]
                                      [--kernels sparse dense] [--json FILE]

Counted is every tensor that is alive after a training step, before gradients are set to None: parameters, gradients,
optimizer state and buffers; of the masked networks also masks, packed masks and tables of the kernels. Each tensor's
memory counts once, and nothing that was alive before the network was made. "dense" is the plain model; "masked" keeps
whole weights and masks; "present" is `growfx.use_kernels(net, kernels, storage="present")`. Random ERK masks, seed 0.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import timm
import torch
from machine import describe
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import growfx

GOAL_DENSITY, GOAL = 0.1, 0.35
OPTIMIZERS: dict[str, Any] = {
    "sgd momentum": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-3),
}


def alive() -> dict[int, int]:
    """Bytes of all tensors, by the address of their memory."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]  # asking wakes nobody
    tensors += [value.grad for value in tensors if value.is_leaf and value.grad is not None]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}


def build(name: str, pixels: int) -> nn.Module:
    """The model `name` for images of `pixels`, with 10 classes."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **({"img_size": pixels} if "vit" in name else {}))


def measure(name: str, optimizer: str, kind: str, density: float, kernels: str, pixels: int) -> int:
    """Bytes that a training step leaves alive."""
    images, targets = torch.randn(4, 3, pixels, pixels), torch.arange(4)
    before = alive()
    net: nn.Module = build(name, pixels).train()
    if kind != "dense":
        net = growfx.wrap(net, images[:1], density=density, seed=0).train()
        growfx.use_kernels(net, kernels, storage="present" if kind == "present" else "dense")
    step = OPTIMIZERS[optimizer](net.parameters())
    F.cross_entropy(net(images), targets).backward()
    step.step()
    return sum(size for address, size in alive().items() if address not in before)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=["resnet50", "vit_small_patch16_224"])
    parser.add_argument("--density", nargs="+", type=float, default=[0.01, 0.05, 0.1, 0.2])
    parser.add_argument("--kernels", nargs="+", default=["sparse", "dense"])
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.model:
        for optimizer in OPTIMIZERS:
            dense = measure(name, optimizer, "dense", 1.0, "dense", options.pixels)
            for density in options.density:
                masked = measure(name, optimizer, "masked", density, "dense", options.pixels)
                row = {"model": name, "optimizer": optimizer, "density": density, "dense_bytes": dense}
                row["masked_over_dense"] = masked / dense
                for kernels in options.kernels:
                    found = measure(name, optimizer, "present", density, kernels, options.pixels)
                    row[f"{kernels}_kernels_over_dense"] = found / dense
                rows.append(row)
                print(row, flush=True)
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    at_goal = [value for row in rows if row["density"] == GOAL_DENSITY for k, value in row.items() if "kernels" in k]
    print(f"goal at {GOAL_DENSITY:g}: at most {GOAL}; largest {max(at_goal, default=0):.3f}")
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(), "pixels": options.pixels, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
