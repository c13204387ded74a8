"""How long `growfx.wrap` takes, checks against the model included: resnet50, the slowest models, and a random sample.

    python benchmarks/wrap.py [--models 20] [--json benchmarks/results/wrap.json]

The sample is drawn among timm's models below 60M parameters, with values; the slowest ones of the zoo are too large
for that and are wrapped on the meta device. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import timm
import torch
from machine import describe
from torch import nn

import growfx

SLOWEST = ("nfnet_f7", "vit_5b_patch16_sapiens2")
LARGEST = 60_000_000


def shapes_of(name: str) -> nn.Module:
    """The model without values."""
    with torch.device("meta"):
        return timm.create_model(name).to("meta")


def seconds(model: nn.Module) -> float:
    """Time of one wrap."""
    begun = time.perf_counter()
    growfx.wrap(model)
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print; write a JSON file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    growfx.wrap(timm.create_model("resnet10t"), torch.randn(1, 3, 64, 64))  # what is imported once is not counted
    resnet = timm.create_model("resnet50")
    facts = {
        "machine": describe(),
        "resnet50": statistics.median(seconds(resnet) for _ in range(5)),
        "slowest": {name: seconds(shapes_of(name)) for name in SLOWEST},
    }
    names = timm.list_models()
    random.Random(0).shuffle(names)
    sample: dict[str, float] = {}
    for name in names:
        if len(sample) == options.models:
            break
        if sum(p.numel() for p in shapes_of(name).parameters()) < LARGEST:
            torch.manual_seed(0)
            sample[name] = seconds(timm.create_model(name))
    facts |= {"sample": sample, "median": statistics.median(sample.values())}
    text = json.dumps(facts, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
