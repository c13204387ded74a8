"""Inference on a CPU: the sparse and the native runtime over those that people use and over dense torch, in one run.

Random weights under random ERK masks; norms are given seeded scales and the statistics of their inputs, so that values
stay of ordinary size however deep and sparse the network is. Every figure comes from `growfx.bench`: variants take
turns, outputs are compared with dense torch before anything is timed, and a speed is the median of the rounds' ratios.
The yardstick is the fastest of the runtimes that run the dense network in float32 (onnxruntime, OpenVINO), timed in the
same rounds as the sparse runtime; OpenVINO as it comes computes in bfloat16 where the processor does so natively.
torch.compile runs once for each model and number of threads, at batch 1. DeepSparse takes part where
`GROWFX_DEEPSPARSE` names the Python of an environment that has it. A runtime that is not installed is left out
and named. What was measured before on this machine with these libraries is kept, unless `--fresh`; use that after
growfx has changed. On a machine that does other things, too, take `--threads 1 --clock cpu`.

    python benchmarks/inference.py [--models resnet50 ...] [--densities 0.01 ...] [--batches 1 16] [--threads 1 2]
        [--rounds 20] [--clock wall|cpu] [--no-compile] [--fresh] [--json FILE]
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
from growfx.commands.bench.peers import DEEPSPARSE, PEERS, is_offered, missing_packages, peer_versions
from growfx.commands.bench.variants import COMPILED, DENSE, NATIVE, SPARSE
from growfx.recorded.inputs import Inputs

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2)
# (model, batch) -> density -> speed over the best of onnxruntime and OpenVINO, dense, float32.
_MOBILE = {0.01: 2.2, 0.05: 1.8, 0.1: 1.5, 0.2: 1.1}
_VIT = {0.01: 3.5, 0.05: 2.5, 0.1: 2.0, 0.2: 1.3}
GOALS = {
    ("resnet50", 1): {0.01: 4.0, 0.05: 2.5, 0.1: 1.7, 0.2: 1.15},
    ("resnet50", 16): {0.01: 5.0, 0.05: 3.4, 0.1: 2.0, 0.2: 1.2},
    ("mobilenetv3_large_100", 1): _MOBILE,
    ("efficientnet_b0", 1): _MOBILE,
    ("vit_small_patch16_224", 1): _VIT,
    ("vit_small_patch16_224", 16): _VIT,
    ("convnext_tiny", 1): {0.01: 3.0, 0.05: 2.2, 0.1: 1.7, 0.2: 1.2},
}
MODELS = tuple(dict.fromkeys(model for model, _ in GOALS))
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
        self.file, self.machine = file, describe() | peer_versions()
        self.records: list[Record] = []
        if not fresh and file.exists():
            content = json.loads(file.read_text())
            # The number of threads is part of a record.
            same = {**content["machine"], "threads": 0} == {**self.machine, "threads": 0}
            self.records = content["records"] if same else []

    def has(self, **wanted: Any) -> bool:
        """Whether a record has these values."""
        return any(all(record.get(key) == value for key, value in wanted.items()) for record in self.records)

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
            settings = {"batches": [batch], "threads": [threads], "repeats": rounds, "clock": args.clock}
            (measured,) = bench(folder, variants=variants, **settings).measurements
            place = {"model": model, "density": at, "batch": batch, "threads": threads, "clock": args.clock}
            facts = {"rounds": rounds, "best_peer": measured.best_peer}
            results.add([{**place, **facts, **asdict(row)} for row in measured.rows])


def missing(
    model: str, density: float, args: argparse.Namespace, results: Results
) -> Iterator[tuple[int, int, list[str], float | None]]:
    """(batch, threads, variants, density): what is to be measured; density None for what does not depend on it."""
    peers = [name for name in PEERS if is_offered(name) and not missing_packages(name)]
    for batch in args.batches:
        for threads in args.threads:
            place = {"model": model, "batch": batch, "threads": threads, "clock": args.clock}
            compiled = args.compile and batch == 1
            if compiled and not results.has(**place, density=None, variant=COMPILED):
                yield batch, threads, [COMPILED], None
            if not results.has(**place, density=density, variant=SPARSE):
                yield batch, threads, [*peers, SPARSE, NATIVE], density


def table(records: Sequence[Record]) -> str:
    """One row for each model, batch and number of threads.

    Milliseconds of what does not depend on density, the least of those measured beside each density; then the speeds
    over the best peer of what does.
    """
    there = {r["variant"] for r in records}
    dense = [DENSE, *(name for name in (COMPILED, *PEERS) if name in there and name != DEEPSPARSE)]
    sparse = [name for name in (DEEPSPARSE, SPARSE, NATIVE) if name in there]
    densities = sorted({r["density"] for r in records if r["density"] is not None})
    rows = []
    for place in dict.fromkeys(map(_setting, records)):
        here = [r for r in records if _setting(r) == place]
        times = [[r["minimum"] for r in here if r["variant"] == name and r["minimum"] is not None] for name in dense]
        found = {(r["variant"], r["density"]): r for r in here}
        speeds = [_speed(found.get((name, density))) for name in sparse for density in densities]
        rows.append([*place, *(f"{1e3 * min(t):.1f}" if t else "-" for t in times), *speeds])
    headers = ["model", "batch", "threads", "clock", *(f"{name}, ms" for name in dense)]
    headers += [f"{name} {density:.0%}" for name in sparse for density in densities]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _setting(record: Record) -> tuple[Any, ...]:
    return record["model"], record["batch"], record["threads"], record["clock"]


def _speed(record: Record | None) -> str:
    return "-" if record is None or record["over_peer"] is None else f"{record['over_peer']:.2f}x"


def verdicts(records: Sequence[Record]) -> list[str]:
    """Whether each goal is reached that was measured, and every run that has no time."""
    lines = []
    for record in records:
        goal = GOALS.get((record["model"], record["batch"]), {}).get(record["density"])
        if record["variant"] in (SPARSE, NATIVE) and record["over_peer"] is not None and goal is not None:
            word = "reached" if record["over_peer"] >= goal else "missed"
            speed = f"{record['over_peer']:.2f}x over {record['best_peer']}, {record['speedup']:.2f}x over dense torch"
            lines.append(f"{_place(record)}, {record['variant']}: {speed}; goal {goal}x {word}")
    return lines + [f"no time for {r['variant']}, {_place(r)}: {r['note']}" for r in records if r["minimum"] is None]


def _place(record: Record) -> str:
    density = "" if record["density"] is None else f", {record['density']:.0%}"
    threads = f"{record['threads']} thread{'s' * (record['threads'] > 1)}"
    return f"{record['model']}{density}, batch {record['batch']}, {threads}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--rounds", type=int, default=20, help="at batch 1; else a fifth, at least 4")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time of all threads")
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
    absent = {package for name in PEERS if is_offered(name) for package in missing_packages(name)}
    told = [f"not measured for want of {', '.join(sorted(absent))}"] if absent else []
    print("\n".join(["", *verdicts(results.records), "", *told, str(results.machine)]))


if __name__ == "__main__":
    main()
