"""Path rules of recurrences: the gates averaged, the recurrence used once on the mean over time.

Unrolled exactly, one recurrent matrix would count once per step, and log R of a network would grow with the length of
its sequences. Neurons that leak and fire have no matrix, and are unrolled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growfx.passes.path_products.rules.products import carrying
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import PathValue, raw

__all__ = ["FUNCTIONS", "MODULES"]


def _matrix(run: PathRun, module: Any, name: str) -> Tensor | None:
    """Magnitudes of the named matrix, averaged over its gates: (hidden, columns). None when the module has none."""
    if name not in module._parameters:
        return None
    weight = run.learned(module._parameters[name])
    if name.startswith("weight_hr"):
        return weight
    return weight.unflatten(0, (-1, module.hidden_size)).mean(0)


def _states(state: Any) -> list[Any]:
    """Initial hidden and, for an LSTM, cell state: path values or None."""
    given = list(state) if isinstance(state, (tuple, list)) else [state]
    return [item.tensor if isinstance(item, PathValue) else None for item in (*given, None)[:2]]


def _one_direction(
    run: PathRun, module: Any, tensor: Tensor, suffix: str, before: list[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Outputs and cell contents of one layer in one direction: (time, ..., size); `tensor` is (time, ..., input)."""
    into, again, out = (_matrix(run, module, f"weight_{kind}_{suffix}") for kind in ("ih", "hh", "hr"))
    assert into is not None
    assert again is not None
    hidden, cell = before

    def project(values: Tensor) -> Tensor:
        return values if out is None else F.linear(values, out)

    entering = F.linear(tensor, into)
    if cell is not None:
        entering = entering + cell
    mean = project(entering).mean(0)
    if hidden is not None:
        mean = mean + hidden
    contents = entering + F.linear(mean, again)
    return project(contents), contents


def recurrent(run: PathRun, module: Any, value: Any, state: Any = None, hx: Any = None) -> Any:
    """LSTM, GRU and plain recurrences of any number of layers and directions: (outputs, last states)."""
    tensor = carrying(value)
    hidden, cell = _states(hx if state is None else state)
    in_batches = tensor.ndim == 3
    tensor = tensor.transpose(0, 1) if module.batch_first and in_batches else tensor
    last: list[Tensor] = []
    last_cells: list[Tensor] = []
    directions = 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            row = layer * directions + direction
            before = [None if item is None else item[row] for item in (hidden, cell)]
            suffix = f"l{layer}{'_reverse' if direction else ''}"
            out, contents = _one_direction(run, module, tensor, suffix, before)
            outputs.append(out)
            end = 0 if direction else -1
            last.append(out[end])
            last_cells.append(contents[end])
        tensor = torch.cat(outputs, -1)
    out = tensor.transpose(0, 1) if module.batch_first and in_batches else tensor
    states = PathValue(torch.stack(last))
    return PathValue(out), (states, PathValue(torch.stack(last_cells))) if module.mode == "LSTM" else states


def cell(has_memory: bool) -> Callable[..., Any]:
    """The rule of one step: what enters and what was remembered, summed."""

    def rule(run: PathRun, module: Any, value: Any, state: Any = None, hx: Any = None) -> Any:
        hidden, memory = _states(hx if state is None else state)
        into, again = _matrix(run, module, "weight_ih"), _matrix(run, module, "weight_hh")
        assert into is not None
        assert again is not None
        parts = [] if not isinstance(value, PathValue) else [F.linear(carrying(value), into)]
        parts += [] if hidden is None else [F.linear(hidden, again)]
        parts += [] if memory is None else [memory]
        total = torch.stack(parts).sum(0)
        return (PathValue(total), PathValue(total)) if has_memory else PathValue(total)

    return rule


def _fired(inputs: Any, charge: Any, keeps: Any, takes: Any, options: tuple[Any, ...]) -> Any:
    """Spikes, charges and charges before the reset of neurons over (time, ...): what comes in adds to what is kept.

    A spike passes the paths of its charge, as any step that goes on as data; resets do not act on paths. `options` are
    the threshold, the reset, two of the gradient, and whether all charges are wanted or the last alone.
    """
    steps = carrying(inputs)
    state = charge.tensor if isinstance(charge, PathValue) else torch.zeros_like(steps[0])
    charges: list[Tensor] = []
    for step in steps:
        state = state * keeps + step * takes
        charges.append(state)
    fired, all_charges = torch.stack(charges), options[4] if len(options) > 4 else True
    return PathValue(fired), PathValue(fired if all_charges else state), PathValue(fired)


def integrate(run: PathRun, x: Any, v: Any, *options: Any) -> Any:
    """spikingjelly's neurons without a leak, `sj_if`."""
    return _fired(x, v, 1.0, 1.0, options)


def leak(run: PathRun, x: Any, v: Any, tau: float, decay_input: bool, *options: Any) -> Any:
    """spikingjelly's leaky neurons, `sj_lif`: the leak is 1 / tau."""
    return _fired(x, v, 1 - 1 / tau, 1 / tau if decay_input else 1.0, options)


def learned_leak(run: PathRun, x: Any, v: Any, w: Any, decay_input: bool, *options: Any) -> Any:
    """spikingjelly's neurons with a learned leak, `sj_plif`: a constant, sigmoid(w)."""
    share = raw(w).detach().to(torch.float64).sigmoid()
    return _fired(x, v, 1 - share, share if decay_input else 1.0, options)


FUNCTIONS: dict[Any, Any] = {"sj_if.forward": integrate, "sj_lif.forward": leak, "sj_plif.forward": learned_leak}

MODULES: dict[Any, Any] = {
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), recurrent),
    nn.LSTMCell: cell(has_memory=True),
    **dict.fromkeys((nn.GRUCell, nn.RNNCell), cell(has_memory=False)),
}
