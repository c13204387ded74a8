"""How operators of one value pass signals on: activations, norms and their parameters, softmax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from growfx.passes.connect.run import UnitRun
from growfx.passes.connect.signals import narrowed, numbers, tidy
from growfx.passes.connect.values import Named, aligned, combine, known, real

__all__ = ["MODULES", "OPERATORS"]

Operation = Callable[..., Any]


def same(run: UnitRun, op: Operation, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Elementwise operations of one value: every unit stays where it is. A softmax counts the units along its dim."""
    name = run.name
    if name in ("softmax", "log_softmax", "softmin", "normalize"):
        dim = kwargs.get(
            "dim", next((item for item in args if isinstance(item, int)), 1 if name == "normalize" else -1)
        )
        if name == "normalize" and "dim" not in kwargs and len(args) > 1:
            dim = args[1]
        counted(run, value, (dim,), f"a {name} runs over it")
    if name == "prelu" and args:
        weight = known(args[0])
        return value if weight is None else scaled_by(run, value, [args[0]], 1)
    return value


def counted(run: UnitRun, value: Any, axes: Any, reason: str) -> None:
    """Note that something is computed over the units along `axes`, where units stand along them."""
    if aligned(run.signals, value.tensor, axes) is None:
        run.signals.count(numbers(narrowed(value.tensor)), f"{reason} in {run.place}")


def scaled_by(run: UnitRun, value: Any, parameters: list[Any], axis: int) -> Any:
    """A value and parameters with one element per index of the trailing axes (`axis` -1) or of one axis."""
    ids = value.tensor
    for parameter in parameters:
        slots = known(parameter)
        if slots is None or slots.numel() == 0:
            continue
        if axis != -1 and slots.numel() > 1:
            slots = slots.reshape(-1, *(1,) * (ids.ndim - 1 - axis % ids.ndim))
        combine(run.signals, ids, tidy(slots))
    return value


def batch_norm(run: UnitRun, op: Operation, input: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
    """One parameter per channel."""
    given = [item for item in (*args[:4], *kwargs.values()) if isinstance(item, Named)]
    return scaled_by(run, input, given, 1)


def layer_norm(run: UnitRun, op: Operation, input: Any, normalized_shape: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
    """Statistics and parameters over the trailing axes."""
    axes = range(-len(real(normalized_shape)), 0)
    counted(run, input, list(axes), "a norm runs over it")
    return scaled_by(run, input, [item for item in (*args, *kwargs.values()) if isinstance(item, Named)], -1)


def group_norm(run: UnitRun, op: Operation, input: Any, num_groups: int, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
    """Statistics over groups of channels."""
    if num_groups < input.tensor.shape[1]:
        counted(run, input, (1,), "a norm runs over it")
    return scaled_by(run, input, [item for item in (*args, *kwargs.values()) if isinstance(item, Named)], 1)


def neighbours(run: UnitRun, op: Operation, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Local response norm: each channel is divided by its neighbours."""
    run.signals.pin(numbers(narrowed(value.tensor)), f"a norm over neighbouring channels in {run.place}")
    return value


def _own(run: UnitRun) -> list[Any]:
    """Parameters and buffers of a norm; those of one shape are one for all that follows."""
    module, result = run.module, []
    first: dict[torch.Size, Named] = {}
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and tensor.ndim:
            known = run.parameter(f"{run.target}.{name}", tensor, first.get(tensor.shape))
            if first.setdefault(tensor.shape, known) is known or known.ids is not first[tensor.shape].ids:
                result.append(known)
    return result


def batch_norm_module(run: UnitRun, op: Operation, value: Any) -> Any:
    """Batch and instance norms and what their classes do after them."""
    return _then_activate(run, scaled_by(run, value, _own(run), 1))


def scale_module(last: bool, /, run: UnitRun, op: Operation, value: Any) -> Any:
    """Norms with statistics over the trailing axes, over the channels, or over groups of them."""
    module = run.module
    own = [item for item in _own(run) if item.tensor.ndim]
    trailing = max((item.tensor.ndim for item in own), default=1) if last else 1
    groups = getattr(module, "num_groups", 1)
    if last or groups < value.tensor.shape[1]:
        counted(run, value, list(range(-trailing, 0)) if last else (1,), "a norm runs over it")
    return _then_activate(run, scaled_by(run, value, own, -1 if last else 1))


def _then_activate(run: UnitRun, value: Any) -> Any:
    module, target = run.module, run.target
    for name in ("drop", "act"):
        child = module._modules.get(name)
        if child is not None:
            value = run.call(child, f"{target}.{name}", value)
    return value


def same_module(run: UnitRun, op: Operation, value: Any, *args: Any) -> Any:
    """Activations and dropout; a softmax counts, a PReLU has parameters."""
    kind = type(run.module).__name__
    if "Softmax" in kind or kind == "Softmin":
        dim = getattr(run.module, "dim", None)
        counted(run, value, (1 if dim is None else dim,), "a softmax runs over it")
    return scaled_by(run, value, _own(run), 1)


OPERATORS: dict[str, Operation] = {
    "same": same,
    "batch_norm": batch_norm,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "neighbours": neighbours,
}
MODULES: dict[str, Operation] = {
    "same": same_module,
    "batch_norm": batch_norm_module,
    "layer_norm": partial(scale_module, True),
    "group_norm": partial(scale_module, False),
}
