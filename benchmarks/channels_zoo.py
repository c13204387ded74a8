"""Cut models to a share of their multiply-accumulates by growfx and by Torch-Pruning, each in its own process."""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import channels_peer
import torch
from machine import describe
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import growfx
from growfx.models.build import default_input_shape

__all__ = ["FRACTION", "build", "macs", "zoo"]

MODELS = Path(__file__).with_name("channels_models.txt")
FRACTION, SLACK, SAME = 0.5, 0.04, 1e-4
PIXELS = 96  # of images, where the model takes that size; else its own
PATIENCE = 600  # seconds of processor time for one model


def build(name: str) -> nn.Module:
    """The model with random weights in evaluation mode; nothing in it starts at zero, so that no path is silent."""
    torch.manual_seed(0)
    model = growfx.create_model(name).eval()
    for parameter in model.parameters():
        if not bool(parameter.any()) or bool((parameter == parameter.flatten()[0]).all()):
            torch.nn.init.uniform_(parameter, 0.2, 0.7)
    return model


def images_for(model: nn.Module) -> torch.Tensor:
    """One image of `PIXELS` in each direction where the model takes that, else of its own size."""
    channels, *size = default_input_shape(model)[1:]
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, channels, PIXELS, PIXELS), (1, channels, *size)):
        images = torch.randn(shape, generator=generator)
        try:
            with torch.no_grad():
                model(images)
            return images
        except Exception:  # of the model's own code: its sizes are fixed
            if shape[2:] == tuple(size):
                raise
    raise AssertionError


def macs(model: nn.Module, images: torch.Tensor) -> float:
    """Multiply-accumulates of one call."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Torch's counter looks for the gradient of what a module is given, which a view of a parameter has none of here.
    for parameter in trained:
        parameter.requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    for parameter in trained:
        parameter.requires_grad_(True)
    return counter.get_total_flops() / 2


def first(output: Any) -> torch.Tensor:
    """The logits among what a model returns."""
    while not isinstance(output, torch.Tensor):
        output = output[0] if isinstance(output, (tuple, list)) else next(iter(output.values()))
    return output


def error_of(reference: nn.Module, small: nn.Module, images: torch.Tensor) -> float:
    """The largest difference of the logits over the largest of `reference`."""
    with torch.no_grad():
        expected, got = first(reference(images)), first(small(images))
    return float((got - expected).abs().max() / expected.abs().max())


def by_growfx(name: str) -> dict[str, Any]:
    """What growfx makes of a model."""
    model = build(name)
    images = images_for(model)
    net = growfx.wrap(model, images).eval()
    dense = macs(model, images)
    begun = time.process_time()
    plan = growfx.plan_channels(net, f"flops={FRACTION}")
    seconds = time.process_time() - begun
    net.set_masks(plan.masks(net))
    small = growfx.unwrap(net, compact=True)
    error, share = error_of(net, small, images), macs(small, images) / dense
    good = FRACTION - SLACK <= share <= FRACTION + 1e-6 and error <= SAME
    return {
        "good": good,
        "pixels": images.shape[-1],
        "share": share,
        "params": sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters()),
        "error": error,
        "plan_seconds": round(seconds, 2),
        "reason": "" if good else f"{share:.4f} of the multiply-accumulates, error {error:.1e}",
    }


def by_torch_pruning(name: str) -> dict[str, Any]:
    """What Torch-Pruning makes of a model: half of the multiply-accumulates or fewer, and it runs."""
    model = build(name)
    images = images_for(model)
    begun, dense = time.process_time(), macs(model, images)
    cut = channels_peer.cut(model, images, lambda small: macs(small, images) / dense, FRACTION)
    seconds = time.process_time() - begun
    error = error_of(cut.zeroed, cut.small, images)
    halved = cut.share <= FRACTION
    return {
        "good": halved and error <= SAME,
        "halved_and_runs": halved,
        "pixels": images.shape[-1],
        "share": cut.share,
        "error": error,
        "plan_seconds": round(seconds, 2),
        "reason": "" if halved and error <= SAME else f"{cut.share:.4f} of the multiply-accumulates, error {error:.1e}",
    }


WAYS: dict[str, Callable[[str], dict[str, Any]]] = {"growfx": by_growfx, "torch-pruning": by_torch_pruning}


def zoo(ways: Sequence[str], out: Path, names: Sequence[str] = (), again: bool = False) -> dict[str, Any]:
    """All models by each way, written to `out` after each; what is there already is not done again.

    Args:
        ways: of `WAYS`.
        out: a JSON file; models that it has are left out.
        names: some of the models only.
        again: also those that failed.
    """
    facts: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    every = MODELS.read_text().split()
    facts |= {"machine": describe(), "pixels": PIXELS, "patience": PATIENCE}
    for way in ways:
        found = facts.setdefault(way, {})
        if way == "torch-pruning":
            facts["torch-pruning version"] = channels_peer.version()
        for name in names or every:
            if name in found and not (again and not found[name]["good"]):
                continue
            begun = time.time()
            found[name] = alone(way, name)
            print(way, name, found[name], f"{time.time() - begun:.0f} s", file=sys.stderr, flush=True)
            ordered = {key: found[key] for key in every if key in found}
            good = [fact["good"] for fact in ordered.values()]
            facts[way], facts[f"{way} share"] = ordered, sum(good) / len(good)
            facts[f"{way} models"] = len(good)
            out.write_text(json.dumps(facts, indent=1) + "\n")
            found = ordered
        print(f"{way}: {facts[f'{way} share']:.1%} of {len(found)}")
    return facts


def alone(way: str, name: str) -> dict[str, Any]:
    """The facts of one model, found in a process of its own that may take `PATIENCE` seconds of processor time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(way, name, sender))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join()
    if result is not None:
        return result
    late = process.exitcode == -signal.SIGXCPU
    reason = f"no result within {PATIENCE} s" if late else f"the process ended with {process.exitcode}"
    return {"good": False, "reason": reason}


def _send(way: str, name: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE + 5))
    torch.set_num_threads(1)
    try:
        sender.send(WAYS[way](name))
    except Exception as error:  # what a model's own code, or a library, refuses
        sender.send({"good": False, "reason": f"{type(error).__name__}: {_in_one_line(str(error))}"[:400]})


def _in_one_line(text: str) -> str:
    """A message in one line, without the folders of this machine."""
    return " ".join(word.rpartition("/site-packages/")[2] for word in text.split())
