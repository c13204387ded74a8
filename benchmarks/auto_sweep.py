"""What `kernels="auto"` costs or saves: its training step over the masked dense step, on forty models.

    python benchmarks/auto_sweep.py [--models NAME ...] [--density 0.01 0.1 0.5 1] [--every] [--rounds 8] [--json FILE]

Of each model a small batch at small size; the densities take turns over the models, or with `--every` each model has
them all. Both variants are copies of one masked network (random ERK masks, seed 0) with SGD and momentum; they take
turns step by step, one thread, CPU time. For each pair of steps the ratio is kept; reported are its quartiles by model,
and the median of the models' medians. Goal: that median at most 1.01, and no lower quartile above 1.02.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from machine import describe
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

import growfx

MEDIAN, QUARTILE = 1.01, 1.02
BATCH, PIXELS = 8, 64
# One of a family each, small ones.
MODELS = (
    *("resnet10t", "resnet14t", "resnet18", "resnet26t", "seresnet18", "skresnet18", "resnetv2_18", "res2net50_14w_8s"),
    *("regnetx_002", "regnety_002", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small_050"),
    *("efficientnet_b0", "efficientnet_lite0", "mnasnet_050", "ghostnet_050", "tinynet_e", "lcnet_035", "mixnet_s"),
    *("densenet121", "vgg11", "dla34", "hardcorenas_a", "rexnet_100", "repvgg_a0", "convnext_atto", "convnextv2_atto"),
    *(
        "resmlp_12_224",
        "mixer_s32_224",
        "gmixer_12_224",
        "poolformerv2_s12",
        "vit_tiny_patch16_224",
        "deit_tiny_patch16_224",
    ),
    *("cait_xxs24_224", "levit_128s", "efficientformerv2_s0", "edgenext_xx_small", "mobileone_s0", "fbnetc_100"),
)
Step = Callable[[], Any]


def build(name: str) -> tuple[Any, Tensor] | None:
    """The model and a batch; None where the model takes other sizes only."""
    torch.manual_seed(0)
    for pixels, sizes in ((PIXELS, {}), (PIXELS, {"img_size": PIXELS}), (224, {})):
        try:
            model, images = timm.create_model(name, num_classes=10, **sizes), torch.randn(BATCH, 3, pixels, pixels)
            with torch.no_grad():
                model.train()(images)
        except (TypeError, AssertionError, RuntimeError, ValueError):
            continue
        return model.train(), images
    return None


def trainer(net: Any, images: Tensor) -> Step:
    """A training step that can be called again and again."""
    optimizer, targets = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9), torch.arange(len(images)) % 10

    def step() -> None:
        found = net(images)
        F.cross_entropy(found[0] if isinstance(found, (tuple, list)) else found, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, density: float, rounds: int) -> dict[str, Any]:
    """Quartiles of the ratio of one model at one density, and how many layers took sparse kernels."""
    made = build(name)
    if made is None:
        return {"model": name, "density": density, "skipped": "it does not run on small images"}
    model, images = made
    net = growfx.wrap(model, images[:2], density=density, seed=0).train()
    masked, auto = trainer(copy.deepcopy(net), images), trainer(growfx.use_kernels(net, example_inputs=images), images)
    for _ in range(2):
        masked(), auto()
    ratios = []
    for number in range(rounds):
        times = {}
        # Who goes first takes turns too: it finds the caches as the other left them.
        for which in ((masked, auto), (auto, masked))[number % 2]:
            start = time.thread_time()
            which()
            times[which] = time.thread_time() - start
        ratios.append(times[auto] / times[masked])
    low, median, high = statistics.quantiles(ratios, n=4)
    taken = [layer.kernel for layer in net.kernel_report.layers.values()]
    facts = {"pixels": images.shape[-1], "sparse": taken.count("sparse"), "layers": len(taken)}
    return {"model": name, "density": density, "low": low, "median": median, "high": high, **facts}


def main() -> None:
    """Measure, print the table and say whether the goals are reached."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--density", nargs="+", type=float, default=[0.01, 0.1, 0.5, 1.0])
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    turns = itertools.cycle(options.density)
    per_model = (lambda: options.density) if options.every else (lambda: [next(turns)])
    pairs = [(name, density) for name in options.models for density in per_model()]
    rows = []
    for name, density in pairs:
        rows.append(measure(name, density, options.rounds))
        print(rows[-1], flush=True)
        if options.json:
            options.json.write_text(json.dumps({"machine": describe(), "batch": BATCH, "rows": rows}, indent=1) + "\n")
    measured = [row for row in rows if "median" in row]
    print(tabulate(measured, headers="keys", floatfmt=".3f"))
    median, worst = statistics.median(row["median"] for row in measured), max(row["low"] for row in measured)
    print(
        f"{len(measured)} models: median {median:.3f} (goal {MEDIAN}), largest lower quartile {worst:.3f} ({QUARTILE})"
    )


if __name__ == "__main__":
    main()
