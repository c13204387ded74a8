"""Training step of a masked network over the same network dense: forward, backward and SGD with momentum.

    python benchmarks/step.py [--case MODEL:BATCH:PIXELS ...] [--part time evaluation memory updates compiled]
                              [--rounds 20] [--density 0.1] [--json FILE]

time      Steps of all variants take turns in one process. A ratio is taken round by round and its median reported, so
          that a machine whose speed drifts does not decide. "again" is a second dense network: its ratio shows the
          noise. "unchecked" is the masked network without the pass over its weights before each use, which makes them
          zero outside the masks whoever wrote to them. "prune" and "parametrize" are torch's own ways to mask, with
          the same masks.
evaluation  A forward in evaluation mode without gradients, in the same way; the cases have their own sizes (batch 1).
compiled  The same under torch.compile, for what is compiled in reasonable time.
memory    Peak memory of a few steps beyond what the process had before the model, each variant in a process of its own
          (Linux).
updates   What an exchange of edges (RigL) adds: the time of a step with one beyond that of a step without, spread over
          the 100 steps between two.

On a GPU: bfloat16 autocast and channels_last, batch 256 at 224 pixels. Masks are random ERK masks of `--density`. Every
goal is printed as reached or missed. The file is written after every case.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import timm
import torch
from machine import describe
from tabulate import tabulate
from torch import nn
from torch.nn.utils import parametrize, prune
from tqdm import tqdm

import growfx
from growfx.masked import layers

VARIANTS = ("dense", "again", "masked", "unchecked", "prune", "parametrize")
CPU_CASES = ("resnet50:32:64", "vit_small_patch16_224:32:64", "convnext_tiny:32:64")
EVALUATION_CASES = ("resnet50:1:224", "vit_small_patch16_224:1:224", "convnext_tiny:1:224")
GPU_CASES = ("resnet50:256:224", "vit_small_patch16_224:256:224", "convnext_tiny:256:224")
LINUX_PEAK = Path("/proc/self/clear_refs")
INTERVAL = 100  # steps between two updates
GOALS = {  # by part, largest ratio to reach on (GPU, CPU)
    "time": (1.05, 1.05),
    "evaluation": (1.20, 1.20),
    "compiled": (1.02, 1.03),
    "memory": (1.15, 1.15),
    "updates": (0.02, 0.02),
}


class TimesMask(nn.Module):
    """A parametrization: the weight times its mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the masked weight."""
        return weight * self.mask


def build(variant: str, name: str, size: int, density: float) -> nn.Module:
    """The model of a case in one variant; its weights and masks are the same in all of them."""
    torch.manual_seed(0)
    resized = {"img_size": size} if name.startswith(("vit", "swin", "mixer")) and size != 224 else {}
    model = timm.create_model(name, num_classes=100, **resized)
    if variant in ("dense", "again"):
        return model
    net = growfx.wrap(model, torch.randn(1, 3, size, size), density=density)
    if variant in ("masked", "unchecked"):
        return net
    masks = {layer: masked.mask.clone() for layer, masked in net.layers.items()}
    model = growfx.unwrap(net)
    del net
    for layer, mask in masks.items():
        module = model.get_submodule(layer)
        if variant == "prune":
            prune.custom_from_mask(module, "weight", mask)
        else:
            parametrize.register_parametrization(module, "weight", TimesMask(mask.float()))
    return model


@contextmanager
def without_check() -> Iterator[None]:
    """Take stored weights for zero outside their masks, unseen."""
    checks = layers.obeys, layers.mask_in_place
    layers.obeys, layers.mask_in_place = lambda *_: True, lambda values, _: values
    try:
        yield
    finally:
        layers.obeys, layers.mask_in_place = checks


class Step:
    """One training step on fixed data; on a GPU in bfloat16 and channels_last."""

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        size: int,
        compiled: bool = False,
        checked: bool = True,
        training: bool = True,
    ) -> None:
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        generator = torch.Generator().manual_seed(1)
        self.model = model.train(training).to(self.device)
        self.checked, self.training = checked, training
        self.x = torch.randn(batch, 3, size, size, generator=generator).to(self.device)
        self.y = torch.randint(0, 100, (batch,), generator=generator).to(self.device)
        self.amp = self.device.type != "cpu"
        if self.amp:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.x = self.x.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        self.method = None
        self.forward = torch.compile(self.model) if compiled else self.model

    def seconds(self) -> float:
        """Run forward, backward, SGD, the method if there is one, and zero_grad once."""
        self.wait()
        start = time.perf_counter()
        with nullcontext() if self.checked else without_check():
            self.run()
        self.wait()
        return time.perf_counter() - start

    def run(self) -> None:
        """One forward, and in training the rest of a step."""
        if not self.training:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                self.forward(self.x)
            return
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = nn.functional.cross_entropy(self.forward(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        if self.method is not None:
            self.method.step()
        self.optimizer.zero_grad()

    def wait(self) -> None:
        """Wait for the accelerator, if there is one."""
        if self.amp:
            torch.accelerator.synchronize()


def parse(case: str) -> tuple[str, int, int]:
    name, batch, size = case.split(":")
    return name, int(batch), int(size)


def measure_time(
    case: str, density: float, rounds: int, compiled: bool = False, training: bool = True, warmup: int = 3
) -> list[dict]:
    name, batch, size = parse(case)
    variants = ("dense", "again", "masked") if compiled else VARIANTS if training else VARIANTS[:4]
    steps = {
        v: Step(build(v, name, size, density), batch, size, compiled, v != "unchecked", training) for v in variants
    }
    seconds: dict[str, list[float]] = {v: [] for v in variants}
    order = random.Random(0)
    for i in range(rounds + warmup):
        for variant in order.sample(variants, len(variants)):
            spent = steps[variant].seconds()
            if i >= warmup:
                seconds[variant].append(spent)
    steps["masked"].model.verify()
    # The two dense networks together are the measure of all others; against each other they show the noise.
    both = [(a + b) / 2 for a, b in zip(seconds["dense"], seconds["again"], strict=True)]
    rows = []
    for variant in variants[1:]:
        other = seconds["dense"] if variant == "again" else both
        ratios = sorted(a / b for a, b in zip(seconds[variant], other, strict=True))
        rows.append(
            {
                "case": case,
                "variant": variant,
                "ms": 1e3 * statistics.median(seconds[variant]),
                "dense_ms": 1e3 * statistics.median(seconds["dense"]),
                "over_dense": statistics.median(ratios),
                "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            }
        )
    return rows


def peak(variant: str, case: str, density: float, steps: int = 4) -> int:
    """Bytes that building the network and training it for a few steps takes at most, in this process."""
    name, batch, size = parse(case)
    nn.Conv2d(3, 3, 3)(torch.randn(1, 3, 8, 8)).sum().backward()  # what torch itself sets up on first use
    LINUX_PEAK.write_text("5")  # the highest use so far, that of imports, is forgotten
    before = used()
    step = Step(build(variant, name, size, density), batch, size)
    for _ in range(steps):
        step.seconds()
    return torch.accelerator.max_memory_allocated() if step.amp else used() - before


def used() -> int:
    """The most bytes of memory this process has had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def measure_memory(case: str, density: float) -> list[dict]:
    found = {}
    for variant in (v for v in VARIANTS if v != "unchecked"):
        code = f"import step; print(step.peak({variant!r}, {case!r}, {density}))"
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        found[variant] = int(run.stdout.split()[-1])
    return [
        {"case": case, "variant": v, "mib": found[v] / 2**20, "over_dense": found[v] / found["dense"]}
        for v in found
        if v != "dense"
    ]


def measure_updates(case: str, density: float, rounds: int) -> list[dict]:
    name, batch, size = parse(case)
    net = growfx.wrap(build("dense", name, size, density), torch.randn(1, 3, size, size))
    step = Step(net, batch, size)
    # Every second step exchanges edges, so that each has one without beside it.
    step.method = growfx.methods.create("rigl", density=density, update_every=2, update_until=1.0, drop_fraction=0.3)
    step.method.attach(net, step.optimizer, total_steps=4 * rounds + 8, steps_per_epoch=2)
    seconds = [step.seconds() for _ in range(2 * rounds + 4)][4:]
    plain, updating = seconds[::2], seconds[1::2]
    extra = sorted(b - a for a, b in zip(plain, updating, strict=True))
    usual = statistics.median(plain)
    return [
        {
            "case": case,
            "variant": "rigl",
            "ms": 1e3 * usual,
            "update_ms": 1e3 * statistics.median(extra),
            "over_dense": statistics.median(extra) / (INTERVAL * usual),
        }
    ]


MEASURES: dict[str, Callable[[str, float, int], list[dict]]] = {
    "time": measure_time,
    "memory": lambda case, density, _: measure_memory(case, density),
    "updates": lambda case, density, rounds: measure_updates(case, density, max(rounds // 2, 2)),
    "evaluation": lambda case, density, rounds: measure_time(case, density, 2 * rounds, training=False),
    "compiled": lambda case, density, rounds: measure_time(case, density, rounds, compiled=True),
}


def judged(part: str, row: dict) -> dict:
    """The row, with the goal for what growfx answers for, and whether it was reached."""
    if row["variant"] not in ("masked", "rigl"):
        return {**row, "goal": None, "reached": None}
    goal = GOALS[part][0 if torch.accelerator.is_available() else 1]
    return {**row, "goal": goal, "reached": row["over_dense"] <= goal}


def verdicts(results: dict[str, list[dict]]) -> list[str]:
    """One line for each goal."""
    word = {True: "reached", False: "missed"}
    return [
        f"{part}, {row['case']}: {row['over_dense']:.4f}, goal {row['goal']} {word[row['reached']]}"
        for part, rows in results.items()
        for row in rows
        if row["goal"] is not None
    ]


def cases_of(part: str, wanted: list[str] | None) -> Sequence[str]:
    """The cases asked for, or the usual ones; on a CPU a compiler takes minutes for networks as deep as a ResNet-50."""
    if wanted is not None:
        return wanted
    if part == "evaluation":
        return EVALUATION_CASES
    if torch.accelerator.is_available():
        return GPU_CASES
    return [case for case in CPU_CASES if part != "compiled" or case.startswith("vit")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="model:batch:pixels, repeatable")
    parser.add_argument("--part", nargs="+", choices=list(MEASURES), default=list(MEASURES), help="what to measure")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each variant")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    facts = {"machine": describe(), "density": args.density, "rounds": args.rounds, "results": {}}
    for part in args.part:
        rows = facts["results"][part] = []
        for case in tqdm(cases_of(part, args.case), desc=part, unit="case"):
            rows += [judged(part, row) for row in MEASURES[part](case, args.density, args.rounds)]
            torch._dynamo.reset()
            if args.json:
                args.json.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"\n{part}\n{tabulate(rows, headers='keys', floatfmt='.3f')}\n", flush=True)
    print("\n".join([*verdicts(facts["results"]), "", str(facts["machine"])]))


if __name__ == "__main__":
    main()
