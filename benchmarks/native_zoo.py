"""How many models of timm and torchvision the native runtime runs: every N-th of those below 60 million parameters.

    python benchmarks/native_zoo.py [--stride 10] [--first 0] [--out benchmarks/results/native_zoo.json]
    python benchmarks/native_zoo.py --scan [--stride 9]

Each is masked at random to a density of 0.1 and exported; its outputs at a batch of 2 are compared with the masked
network's, and its file with the artifact. A model counts where the outputs agree within 1e-4 of the largest. What the
file holds is not checked again, so that a run that was stopped goes on: remove the file to begin anew.

`--scan` records the operators of the models on the meta device, where nothing is computed: it lists those that no rule
knows, by the number of models that need them, under `scan` in the same file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import statistics
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from machine import describe

import growfx
from growfx.commands.zoo.inputs import arguments_of, forms, identity_of, model_names
from growfx.commands.zoo.native import check_native
from growfx.commands.zoo.outputs import enliven
from growfx.models.build import blueprint
from growfx.passes.lower.plan import unknown_operators
from growfx.recorded.inputs import as_inputs

LARGEST = 60_000_000


def measured(name: str) -> dict[str, Any] | None:
    """What was found of one model; None for one that is too large."""
    begun = time.process_time()
    try:
        arguments = arguments_of(name)
        plan = blueprint(identity_of(name, arguments)).to("meta")
        if sum(p.numel() for p in plan.parameters()) >= LARGEST:
            return None
        torch.manual_seed(0)
        model = growfx.create_model(name, **arguments).eval()
        enliven(model)
        net = wrapped(model, [form.inputs(1, 0) for form in forms(name, plan)])
        found = check_native(net)
        facts: dict[str, Any] = {"model": name, "verdict": found.verdict, "error": found.error, "steps": found.steps}
        if found.bytes:
            with tempfile.TemporaryDirectory() as folder:
                facts |= {"bytes": found.bytes, "artifact": growfx.save(net, folder).bytes}
    except Exception as error:  # the model itself, or growfx.wrap, refuses
        text = " ".join(f"{type(error).__name__}: {error}".split())
        facts = {"model": name, "verdict": f"n/a: {text[:200]}"}
    return facts | {"seconds": round(time.process_time() - begun, 1)}


def scanned(name: str) -> dict[str, Any] | None:
    """The operators of one model that no rule knows; None for a model that is too large."""
    begun = time.process_time()
    facts: dict[str, Any] = {"model": name}
    try:
        arguments = arguments_of(name)
        plan = blueprint(identity_of(name, arguments)).to("meta")
        if sum(p.numel() for p in plan.parameters()) >= LARGEST:
            return None
        facts["missing"] = lacking(plan.eval(), [form.inputs(1, 0, "meta") for form in forms(name, plan)])
    except Exception as error:  # the model itself, or the recording, refuses
        facts["refused"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return facts | {"seconds": round(time.process_time() - begun, 1)}


def lacking(model: torch.nn.Module, examples: list[Any]) -> dict[str, int]:
    """Operators that no rule knows, and how often each is called, on the first example inputs that the model takes."""
    for example in examples[:-1]:
        with contextlib.suppress(Exception):
            return dict(unknown_operators(model, as_inputs(example)))
    return dict(unknown_operators(model, as_inputs(examples[-1])))


def scan_summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What a scan found, the models with something missing by name."""
    counts = Counter(name for facts in found for name in facts.get("missing", ()))
    lacks = {facts["model"]: facts.get("missing") or facts["refused"] for facts in found if facts.get("missing") != {}}
    return {
        "models": len(found),
        "known": len(found) - len(lacks),
        "missing": dict(counts.most_common()),
        "lacking": lacks,
    }


def wrapped(model: torch.nn.Module, examples: list[Any]) -> growfx.MaskedGraph:
    """The model, masked, on the first example inputs that it takes."""
    for example in examples[:-1]:
        with contextlib.suppress(growfx.TraceError):
            return growfx.wrap(model, example, density=0.1).eval()
    return growfx.wrap(model, examples[-1], density=0.1).eval()


def missing(found: list[dict[str, Any]]) -> dict[str, int]:
    """Operator without a kernel -> models that need it."""
    counts = Counter(
        name
        for facts in found
        if "no kernel for" in facts["verdict"]
        for name in re.findall(r"`([^`]+)`", facts["verdict"])
    )
    return {name: n for name, n in counts.most_common() if name != "growfx.load"}


def run_summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What was found of the models that ran, and of each of them."""
    ratios = [facts["bytes"] / facts["artifact"] for facts in found if facts.get("artifact")]
    return {
        "machine": describe(),
        "models": len(found),
        "native": sum(facts["verdict"] == "yes" for facts in found),
        "largest_error": max((facts.get("error", 0.0) for facts in found if facts["verdict"] == "yes"), default=0.0),
        "bytes_over_artifact": {"median": statistics.median(ratios), "largest": max(ratios)} if ratios else {},
        "missing": missing(found),
        "found": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stride", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--scan", action="store_true", help="compute nothing, and list what is missing")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no model after so long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/native_zoo.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = model_names("*")[options.first :: options.stride]
    random.Random(0).shuffle(names)  # where time ends, what was checked is still a fair sample
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    found: list[dict[str, Any]] = [] if options.scan else kept.get("found", [])
    known = {facts["model"] for facts in found}
    begun = time.monotonic()
    tried = 0
    for name in names:
        if time.monotonic() - begun > options.seconds:
            break
        tried += 1
        if name in known:
            continue
        facts = scanned(name) if options.scan else measured(name)
        if facts is None:
            continue
        found.append(facts)
        if facts.get("verdict") != "yes" and facts.get("missing") != {}:
            print(json.dumps(facts), flush=True)
        if not options.scan:
            options.out.write_text(json.dumps(kept | run_summary(found), indent=1) + "\n")
    if options.scan:
        kept["scan"] = {"machine": describe(), "stride": options.stride, "tried": tried, **scan_summary(found)}
        options.out.write_text(json.dumps(kept, indent=1) + "\n")
    summary = kept["scan"] if options.scan else run_summary(found)
    print(json.dumps({key: value for key, value in summary.items() if key != "found"}, indent=1))


if __name__ == "__main__":
    main()
