"""A grown network against the dense one of the same final schedule, on a folder of images, over several seeds.

By default a reduced protocol that a CPU can run: `--per-class` training images of each class, `--val-per-class`
others for validation, all test images (or `--test-per-class`). The subsets are drawn by `--split-seed`. Everything
else is the command line's own: `growfx grow` and `growfx train --method dense`.

    python benchmarks/grow.py --data cifar10/ [--model wide_resnet:wrn_16_2] [--epochs 10] [--seeds 0 1 2]
        [--per-class 500] [--set key=value ...] [--grow-set key=value ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe
from tabulate import tabulate


def subset(data: Path, target: Path, sizes: dict[str, int], seed: int) -> dict[str, int]:
    """Link a part of `data` into train/, val/ and test/ of `target`; a size of 0 takes all. Returns image counts.

    `target` is there once it is whole: an interrupted call leaves none that a later one would take for it.
    """
    whole, target = target, target.with_name(f"{target.name}.part")
    shutil.rmtree(target, ignore_errors=True)
    counts = dict.fromkeys(("train", "val", "test"), 0)
    for split in ("train", "test"):
        for folder in sorted(p for p in (data / split).iterdir() if p.is_dir()):
            files = sorted(folder.iterdir())
            random.Random(f"{seed} {split} {folder.name}").shuffle(files)
            first = sizes[split] or len(files) - (sizes["val"] if split == "train" else 0)
            parts = {split: files[:first]}
            if split == "train":
                parts["val"] = files[first : first + sizes["val"]]
            for part, chosen in parts.items():
                (target / part / folder.name).mkdir(parents=True)
                for file in chosen:
                    (target / part / folder.name / file.name).symlink_to(file.resolve())
                counts[part] += len(chosen)
    target.replace(whole)
    return counts


def run(arguments: list[str]) -> dict[str, Any]:
    start = time.perf_counter()
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "growfx", *arguments, "--json", "--overwrite", "--quiet"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return {**json.loads(done.stdout), "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="wide_resnet:wrn_16_2")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per-class", type=int, default=500)
    parser.add_argument("--val-per-class", type=int, default=200)
    parser.add_argument("--test-per-class", type=int, default=0)
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="option of both runs")
    parser.add_argument("--grow-set", action="append", default=[], help="option of the grown run")
    parser.add_argument("--out", type=Path, default=Path("runs/grow-benchmark"))
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"train": args.per_class, "val": args.val_per_class, "test": args.test_per_class}
        counts = subset(args.data, Path(folder), sizes, args.split_seed)
        print(counts, flush=True)
        for seed in args.seeds:
            shared = [args.model, "--data", folder, "--epochs", str(args.epochs), "--seed", str(seed)]
            shared += [a for s in args.set for a in ("--set", s)]
            growth = [a for s in args.grow_set for a in ("--set", s)]
            grown = run(["grow", *shared, *growth, "--out", str(args.out / f"grown-{seed}")])
            dense = run(["train", *shared, "--method", "dense", "--out", str(args.out / f"dense-{seed}")])
            for name, result in (("grown", grown), ("dense", dense)):
                keys = ("test_accuracy", "val_accuracy", "density", "dense_equivalent_epochs", "epochs", "stop_reason")
                row = {"run": name, "seed": seed, **{k: result[k] for k in keys}, "seconds": round(result["seconds"])}
                results.append({**row, "trace": result["trace"]})
                print(row, flush=True)
    columns = [k for k in results[0] if k != "trace"]
    print(tabulate([[r[c] for c in columns] for r in results], headers=columns, floatfmt=".4f"))
    machine = describe()
    print(machine)
    if args.json:
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("data", "json")}
        protocol = {**options, "images": counts}
        Path(args.json).write_text(json.dumps({"machine": machine, "protocol": protocol, "results": results}, indent=1))


if __name__ == "__main__":
    main()
