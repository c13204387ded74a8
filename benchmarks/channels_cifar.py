"""Accuracy of networks cut to a share of their multiply-accumulates, on CIFAR-10 as class folders, by protocol P2.

    python benchmarks/channels_cifar.py --data cifar10/ [--seeds 0 1 2] [--fractions 0.5 0.25]
                                        [--out runs/channels-cifar] [--json FILE]

WRN-16-1, 15,000 training, 5,000 validation and 10,000 test images. For each seed a dense network is trained for 15
epochs and cut in three ways: by growfx, with groups scored by path products or by magnitude, and by Torch-Pruning's
group magnitude (`channels_peer.py`). Each cut leaves a small dense model; all of them are then tuned by the same loop,
10 epochs at a fifth of the learning rate. `small-dense` is the network with as many units fewer in every layer, trained
from scratch for the 25 epochs that the others have had; `scratch` is a fresh start of what growfx left by path
products, trained likewise.

A finished run is not made again: the same command goes on where it was interrupted. The file is written after each run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import channels_peer
import torch
from channels_zoo import macs
from grow import subset
from machine import describe
from tabulate import tabulate
from torch import Tensor, nn
from wide_resnet import WideResNet

import growfx
from growfx.data.loaders import fit_input, make_loader
from growfx.data.sources import open_data
from growfx.options import DataOptions

IMAGES = {"train": 1500, "val": 500, "test": 0}  # of each class; 0: all
EPOCHS, TUNING, TUNING_RATE = 15, 10, 0.02
SCRATCH = ("small-dense", "scratch")


@dataclass(frozen=True)
class Trainer:
    """Trains models on one set of images into run folders of `out`."""

    out: Path
    loaders: Callable[[], dict[str, Any]]

    def result(self, name: str, model: nn.Module, seed: int, **changes: Any) -> dict[str, Any]:
        """The result of a run, which is made or continued where it is not finished yet; `model` holds its weights."""
        net = growfx.wrap(model, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        growfx.train(
            net,
            **self.loaders(),
            out=self.out / name,
            resume=True,
            progress=False,
            seed=seed,
            kernels="dense",
            device="cpu",
            **changes,
        )
        model.load_state_dict(growfx.unwrap(net).state_dict())
        return json.loads((self.out / name / "result.json").read_text())


def fresh(seed: int) -> nn.Module:
    """The dense network at its start."""
    torch.manual_seed(seed)
    return WideResNet(16, 1)


def by_growfx(score: str) -> Callable[[nn.Module, Tensor, float], nn.Module]:
    """A cut by `growfx.plan_channels`."""

    def cut(model: nn.Module, images: Tensor, fraction: float) -> nn.Module:
        net = growfx.wrap(copy.deepcopy(model), images).eval()
        net.set_masks(growfx.plan_channels(net, f"flops={fraction}", score=score).masks(net))
        return growfx.unwrap(net, compact=True)

    return cut


def by_torch_pruning(model: nn.Module, images: Tensor, fraction: float) -> nn.Module:
    """A cut by Torch-Pruning."""
    dense = macs(model, images)
    copied = copy.deepcopy(model).eval()
    return channels_peer.cut(copied, images, lambda small: macs(small, images) / dense, fraction).small


def narrow(seed: int, images: Tensor, fraction: float) -> nn.Module:
    """The widest network of `small-dense` within the share, at its start."""
    low, high, best = 0.0, 1.0, None
    dense = macs(fresh(seed).eval(), images)
    for _ in range(10):
        density = (low + high) / 2
        net = growfx.wrap(fresh(seed), images).eval()
        method = growfx.methods.create("small-dense", density=density)
        method.attach(net, torch.optim.SGD(net.parameters(), 0.1), total_steps=1, steps_per_epoch=1)
        small = growfx.unwrap(net, compact=True)
        low, high, best = (density, high, small) if macs(small, images) <= fraction * dense else (low, density, best)
    assert best is not None
    return best


def renewed(model: nn.Module, seed: int) -> nn.Module:
    """The same layers with fresh weights, of the law that the dense network starts with."""
    torch.manual_seed(seed)
    result = copy.deepcopy(model)
    for module in result.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()
    return result


WAYS: dict[str, Callable[[nn.Module, Tensor, float], nn.Module]] = {
    "growfx, paths": by_growfx("paths"),
    "growfx, magnitude": by_growfx("magnitude"),
    "torch-pruning": by_torch_pruning,
}


def accuracy(model: nn.Module, loader: Any) -> float:
    """The share of a loader's images that the model gets right."""
    with torch.no_grad():
        hits = [(model.eval()(images).argmax(1) == classes).float() for images, classes in loader]
    return float(torch.cat(hits).mean())


def rows_of(seed: int, fraction: float, dense: nn.Module, trainer: Trainer) -> list[dict[str, Any]]:
    """One seed at one share: every way."""
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dense.eval()
    models = {way: cut(dense, images, fraction) for way, cut in WAYS.items()}
    models["small-dense"] = narrow(seed, images, fraction)
    models["scratch"] = renewed(models["growfx, paths"], seed)
    test, rows = trainer.loaders()["test_loader"], []
    for way, model in models.items():
        length = EPOCHS + TUNING if way in SCRATCH else TUNING
        changes = {"epochs": length} if way in SCRATCH else {"epochs": length, "lr": TUNING_RATE}
        before = None if way in SCRATCH else accuracy(model, test)
        share = macs(model.eval(), images) / macs(dense, images)
        name = f"{way.replace(', ', '-')}-{fraction:g}-s{seed}"
        result = trainer.result(name, model, seed, **changes)
        facts = {
            "before tuning": before,
            "accuracy": result["test_accuracy"],
            "flops": share,
            "params": sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters()),
            "epochs": length,
            "train_seconds": result["train_seconds"],
        }
        rows.append({"seed": seed, "fraction": fraction, "way": way, **facts})
        print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and sample standard deviation over the seeds, in points."""
    lines = []
    for fraction in dict.fromkeys(row["fraction"] for row in rows):
        for way in dict.fromkeys(row["way"] for row in rows if row["fraction"] == fraction):
            found = [row for row in rows if (row["fraction"], row["way"]) == (fraction, way)]
            values = [100 * row["accuracy"] for row in found]
            raw = [100 * row["before tuning"] for row in found if row["before tuning"] is not None]
            spread = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
            line = [fraction, way, len(values), f"{statistics.mean(values):.2f}{spread}"]
            line += [f"{statistics.mean(raw):.2f}" if raw else "-"]
            line += [f"{100 * statistics.mean(row[key] for row in found):.1f} %" for key in ("flops", "params")]
            lines.append(line)
    heads = ["of the multiply-adds", "way", "seeds", "accuracy", "before tuning", "multiply-adds", "parameters"]
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Train, cut, tune, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/ of class folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--out", type=Path, default=Path("runs/channels-cifar"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.out / "images"
    if not folder.exists():
        subset(options.data, folder, IMAGES, 0)
    reading = DataOptions(img_size=32)
    source = open_data(str(folder), reading)
    form = fit_input(source, fresh(0), reading)

    def loaders() -> dict[str, Any]:
        made = {split: make_loader(source, split, form, reading, train=split == "train") for split in IMAGES}
        return {f"{split}_loader": loader for split, loader in made.items()}

    trainer, rows = Trainer(options.out, loaders), []
    for seed in options.seeds:
        dense = fresh(seed)
        result = trainer.result(f"dense-s{seed}", dense, seed, epochs=EPOCHS)
        facts = {"accuracy": result["test_accuracy"], "before tuning": None, "flops": 1.0, "params": 1.0}
        facts |= {"epochs": EPOCHS, "train_seconds": result["train_seconds"]}
        rows.append({"seed": seed, "fraction": 1.0, "way": "dense", **facts})
        print(rows[-1], flush=True)
        for fraction in options.fractions:
            rows += rows_of(seed, fraction, dense, trainer)
            if options.json:
                content = {"machine": describe(), "images": IMAGES, "rows": rows}
                options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
