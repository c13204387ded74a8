"""Inference on a CPU: the sparse runtime over dense torch, torch.compile and onnxruntime, in one run.

Random weights under random ERK masks; norms are given seeded scales and the statistics of their inputs, so that values
stay of ordinary size however deep and sparse the network is. Every figure comes from `growfx.bench`: variants take
turns, outputs are compared with dense torch before anything is timed, and a speed over dense is the median of the
rounds' ratios. torch.compile and onnxruntime run the dense network, which does not depend on density: they are timed
once for each model, batch and number of threads, torch.compile only for batch 1. What was measured before on this
machine with these libraries is kept, unless `--fresh`; use that after growfx has changed.

    python benchmarks/inference.py [--models resnet50 ...] [--densities 0.01 ...] [--batches 1 16] [--threads 1 2]
        [--rounds 20] [--no-compile] [--fresh] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from machine import describe
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import growfx
from growfx.commands.bench.measure import bench
from growfx.commands.bench.variants import COMPILED, DENSE
from growfx.recorded.inputs import Inputs

MODELS = ("resnet50", "mobilenetv3_large_100", "vit_small_patch16_224")
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2)
ONNX, SPARSE = "onnxruntime", "sparse runtime"
# resnet50 at batch 1 on 2 threads: density -> speed over dense torch.
GOALS = {0.01: 5.0, 0.05: 2.5, 0.1: 1.6}
# Times dense torch's time, anywhere.
SLOWEST = 1.02
RESULTS = Path(__file__).parent / "results" / "inference.json"

Record = dict[str, Any]


def build(name: str, density: float) -> growfx.MaskedGraph:
    """A network with random weights, whose norms have seen data."""
    torch.manual_seed(0)
    net = growfx.wrap(growfx.create_model(name), density=density)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = None  # the mean over what follows
        norm.reset_running_stats()
    with torch.no_grad():
        net.train()(*Inputs(net.example_inputs(), {}).with_batch(4).redrawn(1).args)
    for norm in norms:
        norm.momentum = 0.1
        # What hardly varies on noise would be enlarged, and rounding errors with it.
        norm.running_var.clamp_(min=0.01)
    return net.eval()


class Results:
    """Records of variants, kept in a file after each table."""

    def __init__(self, file: Path, fresh: bool) -> None:
        self.file, self.machine = file, describe()
        self.records: list[Record] = []
        if not fresh and file.exists():
            content = json.loads(file.read_text())
            # The number of threads is part of a record.
            same = {**content["machine"], "threads": 0} == {**self.machine, "threads": 0}
            self.records = content["records"] if same else []

    def has(self, **wanted: Any) -> bool:
        """Whether a record has these values."""
        return any(all(record[key] == value for key, value in wanted.items()) for record in self.records)

    def add(self, records: Sequence[Record]) -> None:
        """Keep records, in the file too."""
        self.records += records
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(json.dumps({"machine": self.machine, "records": self.records}, indent=1) + "\n")


def measure(model: str, density: float, args: argparse.Namespace, results: Results) -> None:
    """All batch sizes and threads of one network that were not measured before."""
    work = [*missing(model, density, args, results)]
    if not work:
        return
    with tempfile.TemporaryDirectory() as folder:
        growfx.save(build(model, density), folder)
        for batch, threads, variants, at in work:
            # A long call is disturbed less.
            rounds = args.rounds if batch == 1 else max(4, args.rounds // 5)
            report = bench(folder, batches=[batch], threads=[threads], variants=variants, repeats=rounds)
            (measured,) = report.measurements
            place = {"model": model, "density": at, "batch": batch, "threads": threads, "rounds": rounds}
            # The dense network's time beside each: what its speed was compared with.
            kept = [row for row in measured.rows if row.variant in (DENSE, *variants)]
            results.add([{**place, **asdict(row)} for row in kept])


def missing(
    model: str, density: float, args: argparse.Namespace, results: Results
) -> Iterator[tuple[int, int, list[str], float | None]]:
    """(batch, threads, variants, density): what is to be measured; density None for what does not depend on it."""
    for batch in args.batches:
        for threads in args.threads:
            place = {"model": model, "batch": batch, "threads": threads}
            others = [ONNX, *([COMPILED] if args.compile and batch == 1 else [])]
            wanted = [name for name in others if not results.has(**place, density=None, variant=name)]
            if wanted:
                yield batch, threads, wanted, None
            if not results.has(**place, density=density, variant=SPARSE):
                yield batch, threads, [SPARSE], density


def table(records: Sequence[Record]) -> str:
    """One row for each model, batch and number of threads: dense times, then the speed over dense torch."""
    found = {(r["model"], r["batch"], r["threads"], r["density"], r["variant"]): r for r in records}
    densities = sorted({r["density"] for r in records if r["density"] is not None})
    rows = []
    for key in dict.fromkeys((r["model"], r["batch"], r["threads"]) for r in records):
        dense = next((found[*key, d, DENSE] for d in (None, *densities) if (*key, d, DENSE) in found), None)
        others = [_speed(found.get((*key, None, name))) for name in (COMPILED, ONNX)]
        sparse = [_speed(found.get((*key, d, SPARSE))) for d in densities]
        rows.append([*key, "-" if not dense else f"{1e3 * dense['median']:.1f}", *others, *sparse])
    headers = ["model", "batch", "threads", "dense, ms", COMPILED, ONNX, *(f"sparse {d:.0%}" for d in densities)]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _speed(record: Record | None) -> str:
    return "-" if record is None or record["speedup"] is None else f"{record['speedup']:.2f}x"


def verdicts(records: Sequence[Record]) -> list[str]:
    """Whether each goal is reached, and every sparse run that has no time."""
    sparse = [r for r in records if r["variant"] == SPARSE]
    timed = [r for r in sparse if r["speedup"] is not None]
    lines = []
    for density, goal in GOALS.items():
        place = ("resnet50", 1, 2, density)
        run = next((r for r in timed if (r["model"], r["batch"], r["threads"], r["density"]) == place), None)
        if run is None:
            lines.append(f"resnet50, batch 1, 2 threads, {density:.0%}: not measured (goal {goal}x)")
        else:
            word = "reached" if run["speedup"] >= goal else "missed"
            lines.append(f"resnet50, batch 1, 2 threads, {density:.0%}: {run['speedup']:.2f}x, goal {goal}x {word}")
    if timed:
        slowest = min(timed, key=lambda r: r["speedup"])
        word = "reached" if 1 / slowest["speedup"] <= SLOWEST else "missed"
        lines.append(
            f"slowest: {1 / slowest['speedup']:.3f} of dense torch's time ({_place(slowest)}), goal {SLOWEST} {word}"
        )
    lines += [f"no time for {r['variant']}, {_place(r)}: {r['note']}" for r in records if r["speedup"] is None]
    return lines


def _place(record: Record) -> str:
    density = "" if record["density"] is None else f", {record['density']:.0%}"
    return f"{record['model']}{density}, batch {record['batch']}, {record['threads']} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--rounds", type=int, default=20, help="at batch 1; else a fifth, at least 4")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = Results(args.json, args.fresh)
    # Choices that were timed when the machine was busy, or by an earlier version, do not count here.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["GROWFX_CACHE"] = cache
        for model, density in tqdm([(m, d) for m in args.models for d in args.densities], unit="network"):
            measure(model, density, args, results)
    print(table(results.records))
    print("\n".join(["", *verdicts(results.records), "", str(results.machine)]))


if __name__ == "__main__":
    main()
