"""Growth of width on scikit-learn's digits, against the dense network of the same final schedule, over several seeds.

    python benchmarks/channel_growth.py [--seeds 0 1 2] [--price flops] [--growth-ratio 2] [--epochs-per-round 6]
        [--hold-every 2] [--out runs/channel-growth] [--json FILE]

A quarter-width resnet10t (16 to 128 channels), 12 epochs. Both runs are commands of the command line, in folders of
`--out`; those that are finished are not run again. The share of multiply-accumulates is that of the small dense model
that is saved (`growfx.unwrap(net, compact=True)`), as torch counts them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from channels_zoo import macs
from machine import describe
from tabulate import tabulate

import growfx
from growfx.commands.job import reopen

MODEL = ["resnet10t", "--data", "digits", "--set", "model.channels=(16,32,64,128)"]
SCHEDULE = ["--epochs", "12", "--set", "batch_size=32", "--set", "lr=0.05"]
TOLERANCE = 0.005  # the validation split has 359 images: one is 0.28 points


def ran(method: str, options: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """The result of a run, which is made where it is not there yet."""
    if not (folder / "result.json").exists():
        command = [sys.executable, "-m", "growfx", "train", *MODEL, "--method", method, *SCHEDULE, *options]
        command += ["--seed", str(seed), "--out", str(folder), "--overwrite", "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "result.json").read_text())


def share_of(folder: Path) -> tuple[float, float]:
    """Multiply-accumulates and parameters of the small dense model of a run, over those of the dense network."""
    net, _ = reopen(folder)
    images = net.example_inputs()[0]
    models = [growfx.unwrap(net, compact=True), growfx.unwrap(net).eval()]
    small, dense = (macs(model, images) for model in models)
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    return small / dense, sizes[0] / sizes[1]


def main() -> None:
    """Run, print a table, and write a JSON file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--price", choices=("flops", "weights"), default="flops")
    parser.add_argument("--growth-ratio", type=float, default=2.0)
    parser.add_argument("--epochs-per-round", type=int, default=6)
    parser.add_argument("--hold-every", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/channel-growth"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    growth = {"price": options.price, "growth_ratio": options.growth_ratio, "tolerance": TOLERANCE}
    growth |= {"epochs_per_round": options.epochs_per_round, "hold_every": options.hold_every}
    settings = [part for key, value in growth.items() for part in ("--set", f"{key}={value}")]
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        name = f"{options.price}-{options.growth_ratio:g}-{options.epochs_per_round}-{options.hold_every}-{seed}"
        folder = options.out / name
        grown = ran("channel-growth", settings, seed, folder)
        dense = ran("dense", [], seed, options.out / f"dense-{seed}")
        flops, params = share_of(folder)
        rows.append(
            {
                "seed": seed,
                "grown": grown["test_accuracy"],
                "dense": dense["test_accuracy"],
                "flops": flops,
                "params": params,
                "dense_equivalent_epochs": grown["dense_equivalent_epochs"],
                "stopped": grown["stop_reason"],
                "trace": [{k: e.get(k) for k in ("density", "cost", "val_accuracy")} for e in grown["trace"]],
            }
        )
        print(tabulate([{k: v for k, v in row.items() if k != "trace"} for row in rows], headers="keys"), flush=True)
    gap = statistics.mean(row["grown"] - row["dense"] for row in rows)
    print(f"grown less dense, mean of {len(rows)} seeds: {100 * gap:+.2f} points")
    if options.json:
        facts = {"machine": describe(), "growth": growth, "rows": rows, "mean_gap": gap}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
