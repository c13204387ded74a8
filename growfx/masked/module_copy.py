"""A deep copy of a module tree, several times faster than `copy.deepcopy` on networks of many small modules."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from growfx.errors import TraceError
from growfx.masked.layers import MaskedLayer

__all__ = ["copy_modules", "separate_hooks"]

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_ATOMS = (int, float, bool, str, type(None), type)
_SHARED = (torch.Size, torch.dtype, torch.device, types.FunctionType, types.BuiltinFunctionType)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_CONTAINERS = (list, dict, set, OrderedDict)
# Compiled code belongs to the module it was compiled for.
_OF_THE_ORIGINAL = ("_compiled_call_impl",)


def copy_modules(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What ``copy.deepcopy(module, memo)`` gives, also where it would fail.

    Activations that a forward left in attributes (tensors inside an autograd graph) are copied without their history,
    and what cannot be copied (a lock, an open file) is shared.

    Args:
        module: the root.
        memo: id -> what stands for that object in the copy; parameters found there are shared or replaced.

    Raises:
        TraceError: a module's own way to be copied fails.
    """
    parts = list(module.modules())
    memo.update(_without_history(parts, memo))
    plain = [part for part in parts if _copies_plainly(part)]
    # All modules are known before any attribute is copied: an attribute may name a module anywhere in the tree.
    for part in plain:
        memo[id(part)] = type(part).__new__(type(part))
    for part in reversed(parts):  # what is inside first
        if id(part) not in memo:
            _link(plain, memo)
            _copy_by_itself(part, memo)
    for part in plain:
        state = memo[id(part)].__dict__
        for name, value in part.__dict__.items():
            if name in _REGISTRIES:
                state[name] = type(value)((key, copy.deepcopy(item, memo)) for key, item in value.items())
            elif name in _OF_THE_ORIGINAL:
                continue
            elif isinstance(value, _ATOMS):
                state[name] = value
            elif type(value) is OrderedDict and not value:  # a dozen of hooks in every module, nearly always empty
                state[name] = OrderedDict()
            elif name in _HOOKS:
                state[name] = OrderedDict((key, _copied(hook, memo)) for key, hook in value.items())
            else:
                state[name] = _copied(value, memo)
        if isinstance(part, MaskedLayer):
            state.update(memo[id(part)].state_of_a_copy())
    memo.setdefault(id(memo), []).append(parts)  # as deepcopy does: an id is good while its object lives
    return memo[id(module)]


def _link(parts: list[nn.Module], memo: dict[int, Any]) -> None:
    """Let copies under way find one another's modules: a class may look for them when it is copied."""
    for part in parts:
        children = {name: memo[id(child)] for name, child in part._modules.items() if id(child) in memo}
        known: dict[str, Any] = {name: value for name, value in vars(part).items() if isinstance(value, _ATOMS)}
        known.update(_parameters={}, _buffers={}, _modules=children, _non_persistent_buffers_set=set())
        memo[id(part)].__dict__.update(known)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind is types.FunctionType and value.__closure__ is not None:
        return _rebound(value, memo)
    if kind in _SHARED or (kind is tuple and all(isinstance(item, _ATOMS) for item in value)):
        return value
    if kind in (dict, OrderedDict, list, set) and not value:
        return kind()
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever a class of the model's raises when it is copied
        return value


def _rebound(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """A function over the copies of the modules and tensors that it closes over; the same where it holds none."""
    cells = [_rebound_cell(cell, memo) for cell in function.__closure__ or ()]
    if all(a is b for a, b in zip(cells, function.__closure__ or (), strict=True)):
        return function
    own = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    own.__kwdefaults__, own.__dict__ = function.__kwdefaults__, dict(function.__dict__)
    return own


def _rebound_cell(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    try:
        found = memo.get(id(cell.cell_contents))
    except ValueError:  # empty
        return cell
    return cell if found is None else types.CellType(found)


def _copy_by_itself(part: nn.Module, memo: dict[int, Any]) -> None:
    try:
        copy.deepcopy(part, memo)
    except Exception as error:
        kind = type(part).__name__
        raise TraceError(f"a `{kind}` of the model cannot be copied ({type(error).__name__}: {error})") from error


def _without_history(parts: list[nn.Module], memo: dict[int, Any]) -> dict[int, Any]:
    """What stands for tensors inside an autograd graph, which torch refuses to copy."""
    found: dict[int, Any] = {}
    for part in parts:
        for tensor in _tensors([*vars(part).items(), *part._buffers.items()]):
            if not tensor.is_leaf and id(tensor) not in memo:
                found[id(tensor)] = tensor.detach().clone()
    return found


def _tensors(items: list[tuple[str, Any]]) -> Iterator[Tensor]:
    for name, value in items:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple) and name not in _REGISTRIES:
            yield from _tensors([("", item) for item in value])
        elif type(value) is dict and name not in _REGISTRIES:
            yield from _tensors([("", item) for item in value.values()])


def _copies_plainly(part: nn.Module) -> bool:
    kind = type(part)
    if hasattr(kind, "__deepcopy__") or kind.__getstate__ is not nn.Module.__getstate__:
        return False
    return isinstance(part, MaskedLayer) or kind.__reduce_ex__ is nn.Module.__reduce_ex__


def separate_hooks(module: nn.Module) -> None:
    """Give a copy's hooks their own lists, dicts and sets, so that a run of it leaves no trace in the caller's.

    A hook keeps what it sees in its closure, its defaults or its module's globals; objects are shared.
    """
    for part in module.modules():
        for registry in _HOOKS:
            hooks = part.__dict__.get(registry)
            if hooks:
                for key, hook in list(hooks.items()):
                    hooks[key] = _separate(hook)


def _separate(hook: Any) -> Any:
    if isinstance(hook, functools.partial):
        return functools.partial(_separate(hook.func), *map(_shallow, hook.args), **_all_shallow(hook.keywords))
    if not isinstance(hook, types.FunctionType):
        return hook
    names = {name: value for name, value in hook.__globals__.items() if name in hook.__code__.co_names}
    scope = {**hook.__globals__, **_all_shallow(names)}
    cells = [_separate_cell(cell) for cell in hook.__closure__ or ()]
    defaults = tuple(map(_shallow, hook.__defaults__)) if hook.__defaults__ else None
    own = types.FunctionType(hook.__code__, scope, hook.__name__, defaults, tuple(cells))
    own.__kwdefaults__ = _all_shallow(hook.__kwdefaults__) if hook.__kwdefaults__ else None
    return own


def _separate_cell(cell: types.CellType) -> types.CellType:
    try:
        return types.CellType(_shallow(cell.cell_contents))
    except ValueError:  # empty
        return cell


def _shallow(value: Any) -> Any:
    return copy.copy(value) if type(value) in _CONTAINERS else value


def _all_shallow(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _shallow(value) for name, value in values.items()}
