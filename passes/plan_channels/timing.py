"""Seconds of a forward pass on this machine, layer by layer, as a cost of whole units."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from growfx.passes.plan_channels.cost import Cost, CostTable
from growfx.passes.plan_channels.units import WholeUnits
from growfx.passes.trials.precision import outputs_of
from growfx.recorded.inputs import Inputs

__all__ = ["measured_share", "time_cost"]

_RUNS = 5
_SECONDS = 2.0  # of a comparison, at most by one run of each


def time_cost(model: nn.Module, example: Inputs, units: WholeUnits, table: CostTable) -> Cost:
    """Measure the seconds of each layer, the least of several runs; what is between layers goes with their outputs.

    Args:
        model: the plain model in evaluation mode.
        example: what it is called with.
        units: its whole units.
        table: with the pairs of units of its layers.
    """
    names = list(units.found.layers)
    spent = dict.fromkeys(names, np.inf)
    elements = dict.fromkeys(names, 0.0)
    whole = np.inf
    started: list[float] = []
    with ExitStack() as stack, torch.no_grad():
        taken: dict[str, float] = {}
        for name in names:
            module = dict(model.named_modules()).get(name)
            if module is None:
                continue

            def enter(_: nn.Module, args: Any) -> None:
                started.append(_now(model))

            def leave(_: nn.Module, args: Any, result: Any, name: str = name) -> None:
                taken[name] = taken.get(name, 0.0) + _now(model) - started.pop()
                elements[name] = float(result.numel()) if isinstance(result, Tensor) else 0.0

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        for _ in range(_RUNS):
            taken.clear()
            begun = _now(model)
            outputs_of(model, example)
            whole = min(whole, _now(model) - begun)
            spent = {name: min(least, taken.get(name, 0.0)) for name, least in spent.items()}
    seconds = np.array([spent[name] for name in names])
    made = np.array([elements[name] for name in names])
    between = max(float(whole - seconds.sum()), 0.0)
    share = made / made.sum() * between if made.sum() else made
    count = table.base[0] + table.outputs @ table.sizes
    per_unit = (share / np.maximum(count, 1)) @ table.outputs
    pairs = np.maximum(table.pairs(table.sizes), 1)
    return Cost(seconds / pairs, per_unit, float(share.sum() - per_unit @ table.sizes))


def measured_share(dense: nn.Module, small: nn.Module, example: Inputs) -> tuple[float, float]:
    """The seconds of one forward pass of each, the least of runs in turn."""
    best = [np.inf, np.inf]
    end = time.perf_counter() + _SECONDS
    with torch.no_grad():
        for model in (dense, small):
            outputs_of(model, example)
        while True:
            for i, model in enumerate((dense, small)):
                begun = _now(model)
                outputs_of(model, example)
                best[i] = min(best[i], _now(model) - begun)
            if time.perf_counter() > end:
                return float(best[0]), float(best[1])


def _now(model: nn.Module) -> float:
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_cuda:
        torch.cuda.synchronize(parameter.device)
    return time.perf_counter()
