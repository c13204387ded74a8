"""Compare two models by everything but the values of their tensors: classes, shapes, ties, attributes and hooks."""

from __future__ import annotations

import enum
import functools
import inspect
import types
from collections import deque
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["SettingDifference", "setting_differences"]

# Entries of `vars(module)` that are compared as tensors and modules, or are the mode of the moment.
_REGISTRIES = ("_buffers", "_modules", "_non_persistent_buffers_set", "_parameters", "training")
# They choose how the same values are computed, not which.
_HARMLESS = ("inplace",)
# Where timm describes pretrained weights and their images; an artifact keeps a copy of what counts.
_DESCRIPTIONS = ("default_cfg", "pretrained_cfg")
_NUMBERS = (bool, int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.memory_format)
_CALLABLES = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial, type)
_DEEPEST = 8
_LONGEST = 60


@dataclass(frozen=True)
class SettingDifference:
    """One difference between two models.

    Attributes:
        text: a sentence part: "`conv1.stride` is (1, 1), not (2, 2)".
        decisive: whether the models differ even if their outputs agree on some inputs: an argument of a constructor, a
            class, a shape, a function. Counters, caches and hooks are not: outputs decide about these.
    """

    text: str
    decisive: bool


def setting_differences(model: nn.Module, expected: nn.Module) -> list[SettingDifference]:
    """What is different in `model` from what was `expected`, in the order of its modules.

    Values of tensors are not compared; of tensors that are not in the state dict no shapes either.
    """
    ours = dict(model.named_modules(remove_duplicate=False))
    theirs = dict(expected.named_modules(remove_duplicate=False))
    found: list[SettingDifference] = []
    for name in dict.fromkeys((*ours, *theirs)):
        if name not in ours or name not in theirs:
            what = "a module that only the network has" if name in ours else "missing"
            found.append(SettingDifference(f"`{name}` is {what}", decisive=True))
        elif not _same_class(type(ours[name]), type(theirs[name])):
            kinds = f"{type(ours[name]).__name__}, not {type(theirs[name]).__name__}"
            found.append(SettingDifference(f"`{name or '(the model)'}` is a {kinds}", decisive=True))
        else:
            found += _attributes(name, ours[name], theirs[name])
    # The state dict of another tree of modules differs by what has been said already.
    return found if any(difference.decisive for difference in found) else [*found, *_tensors(model, expected)]


def _same_class(one: type, other: type) -> bool:
    """Whether classes are the same; those made on the fly, as by parametrizations, by their names and bases."""
    if one is other:
        return True
    name = lambda kind: (kind.__module__, kind.__qualname__, kind.__bases__)  # noqa: E731
    return "<locals>" not in one.__qualname__ and name(one) == name(other)


def _attributes(path: str, module: nn.Module, expected: nn.Module) -> Iterator[SettingDifference]:
    ours, theirs = vars(module), vars(expected)
    arguments = _constructor_arguments(type(module))
    for key in dict.fromkeys((*ours, *theirs)):
        ignored = key in (*_REGISTRIES, *_HARMLESS, *_DESCRIPTIONS) or key.startswith("_growfx_")
        if ignored or (_is_hooks(key) and not ours.get(key) and not theirs.get(key)):
            continue
        one, other = ours.get(key, _NOTHING), theirs.get(key, _NOTHING)
        if _is_hooks(key):
            if len(one or ()) != len(other or ()):
                yield SettingDifference(f"`{path or '(the model)'}` has hooks (`{key}`)", decisive=False)
        elif _same(one, other, _DEEPEST) is False:
            name = f"{path}.{key}".lstrip(".")
            function = isinstance(one, _CALLABLES) or isinstance(other, _CALLABLES)
            if function:
                how = "was replaced" if other is _NOTHING or one is not _NOTHING else "is missing"
                yield SettingDifference(f"`{name}` {how}", decisive=True)
                continue
            decisive = key in arguments
            yield SettingDifference(f"`{name}` is {_shown(one)}, not {_shown(other)}", decisive)


def _is_hooks(key: str) -> bool:
    return key.endswith("_hooks") or "_hooks_" in key


def _constructor_arguments(kind: type) -> set[str]:
    """Names of what the constructors of a class and its bases take, and of what torch's modules call constants."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            break
        names.update(base.__dict__.get("__constants__", ()))
        if "__init__" in base.__dict__:
            names.update(inspect.signature(base.__dict__["__init__"]).parameters)
    return names


class _Nothing:
    def __repr__(self) -> str:
        return "missing"


_NOTHING = _Nothing()


def _shown(value: Any) -> str:
    text = (
        f"a {type(value).__name__}"
        if isinstance(value, (Tensor, np.ndarray, nn.Module))
        else " ".join(repr(value).split())
    )
    # The address of an object would differ from run to run, and so would the artifact's bytes.
    text = f"a {type(value).__name__}" if " at 0x" in text else text
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _same(one: Any, other: Any, depth: int) -> bool | None:
    """Whether two attributes are equal; None where that cannot be told."""
    if one is other:
        return True
    if depth == 0:
        return None
    if isinstance(one, _CALLABLES) and isinstance(other, _CALLABLES):
        return _same_callable(one, other, depth)
    if isinstance(one, (nn.Module, torch.device)) and isinstance(other, (nn.Module, torch.device)):
        return None
    plain = [isinstance(value, (*_NUMBERS, enum.Enum)) for value in (one, other)]
    if any(plain):
        return all(plain) and (bool(one == other) or bool(one != one and other != other))
    if isinstance(one, (Tensor, np.ndarray)) and isinstance(other, (Tensor, np.ndarray)):
        return _same_array(one, other)
    # Lists come back from JSON where tuples went in.
    if isinstance(one, (list, tuple, deque)) and isinstance(other, (list, tuple, deque)):
        if len(one) != len(other):
            return False
        return _all(_same(a, b, depth - 1) for a, b in zip(one, other, strict=True))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return False
        return _all(_same(one[key], other[key], depth - 1) for key in one)
    if isinstance(one, Set) and isinstance(other, Set):
        return one == other
    if type(one) is not type(other):
        return False
    fields = getattr(one, "__dict__", None)
    return _same(fields, other.__dict__, depth - 1) if fields else None


def _same_array(one: Any, other: Any) -> bool | None:
    if type(one) is not type(other) or one.shape != other.shape or one.dtype != other.dtype:
        return False
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if one.is_meta or other.is_meta or one.layout is not other.layout or one.layout is not torch.strided:
        return None
    return torch.equal(one.detach().cpu(), other.detach().cpu())


def _same_callable(one: Any, other: Any, depth: int) -> bool | None:
    """Functions are the same when their code is and what they hold on to."""
    if isinstance(one, type) or isinstance(other, type):
        return isinstance(one, type) and isinstance(other, type) and _same_class(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, functools.partial):
        parts = lambda f: [f.func, f.args, f.keywords]  # noqa: E731
        return _same(parts(one), parts(other), depth - 1)
    if isinstance(one, types.MethodType):
        return _same(one.__func__, other.__func__, depth - 1)
    if isinstance(one, types.BuiltinFunctionType):
        return one.__qualname__ == other.__qualname__ and type(one.__self__) is type(other.__self__)
    if one.__code__ != other.__code__:
        return False
    held = lambda f: [f.__defaults__, f.__kwdefaults__, *map(_content, f.__closure__ or ())]  # noqa: E731
    return _same(held(one), held(other), depth - 1)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that was never given a value
        return _NOTHING


def _all(verdicts: Iterator[bool | None]) -> bool | None:
    found = list(verdicts)
    return False if False in found else None if None in found else True


def _tensors(model: nn.Module, expected: nn.Module) -> Iterator[SettingDifference]:
    """Names, shapes and ties of what stands in the state dicts."""
    ours, theirs = model.state_dict(keep_vars=True), expected.state_dict(keep_vars=True)
    for name in dict.fromkeys((*ours, *theirs)):
        if name not in ours or name not in theirs:
            yield SettingDifference(f"`{name}` is {'new' if name in ours else 'missing'}", decisive=True)
        elif isinstance(ours[name], Tensor) and isinstance(theirs[name], Tensor):
            shapes = tuple(ours[name].shape), tuple(theirs[name].shape)
            if shapes[0] != shapes[1]:
                yield SettingDifference(f"`{name}` has shape {shapes[0]}, not {shapes[1]}", decisive=True)
    first = _first_names(ours), _first_names(theirs)
    for name in ours:
        if name in theirs and first[0][name] != first[1][name]:
            one, tied = (first[1][name], "no longer") if first[0][name] == name else (first[0][name], "newly")
            yield SettingDifference(f"`{name}` is {tied} tied to `{one}`", decisive=True)


def _first_names(state: Mapping[str, Any]) -> dict[str, str]:
    """The name under which the tensor of each name comes first."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in state.items()}
