"""What a model keeps from one call to the next: a plan that runs in its place would lose it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from growfx.masked.isolation import generators_restored, tables_restored
from growfx.passes.record.recording import cuda_devices, working_copy
from growfx.recorded.inputs import Inputs

__all__ = ["kept_state"]

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.device,
    torch.dtype,
    torch.memory_format,
    slice,
    range,
)
_DEEPEST = 4  # containers and objects within each other that are looked into


def kept_state(model: nn.Module, inputs: Inputs) -> list[str]:
    """What every call of a model changes: names of parameters, buffers and other attributes.

    What only the first of two equal calls changes is left out: it is there for speed, such as a table of positions.
    Writes through `.data` into tensors are not seen, nor what is outside the model's modules.

    Args:
        model: in evaluation mode; a copy of it is run, with values of its own.
        inputs: to run it on; copied.
    """
    copied = working_copy(model, own_values=True)
    devices, changed = cuda_devices(model), list[str]()
    with generators_restored(devices, copied), tables_restored(copied, model), torch.no_grad():
        for _ in range(2):
            before, _alive = _state(copied)
            given = inputs.copied()
            copied(*given.args, **given.kwargs)
            after, _ = _state(copied)
            changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
            if not changed:
                break
    return changed


def _state(model: nn.Module) -> tuple[dict[str, list[Any]], list[Any]]:
    """By attribute, what tells whether it was changed; and what must live as long as that, for ids are given again."""
    found, alive = dict[str, list[Any]](), list[Any]()
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _REGISTRIES}
        for key, value in {**own, **module._parameters, **module._buffers}.items():
            found[f"{name}.{key}".lstrip(".")] = list(_facts(value, alive, 0))
    return found, alive


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _facts(value: Any, alive: list[Any], depth: int) -> Iterator[Any]:
    """What tells a value from others; a container by what it holds, so that equal ones are the same.

    A model that keeps the size of its input keeps another tuple in every call.
    """
    if isinstance(value, _PLAIN):
        yield repr(value)  # a NaN is equal to itself so
        return
    alive.append(value)
    held = None if depth == _DEEPEST else _held(value)
    if held is None:
        yield id(value)
        if isinstance(value, Tensor):
            yield None if value.is_inference() else value._version
        if depth == _DEEPEST or isinstance(value, (Tensor, nn.Module, type)) or not hasattr(value, "__dict__"):
            return
        held = _held(vars(value)) or []
    yield type(value), len(held)
    for part in held:
        yield from _facts(part, alive, depth + 1)


def _held(value: Any) -> list[Any] | None:
    """What a container holds; None for what is none."""
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    return list(value) if isinstance(value, (list, tuple)) else None
