"""Run a model's code and leave the process as it was: random generators, caches, tables kept in modules."""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from growfx.masked.graph import MaskedGraph
from growfx.masked.modules import in_mode

__all__ = ["caches_bypassed", "generators_restored", "python_randomness", "tables_restored", "undisturbed"]

_CACHED = type(functools.lru_cache(lambda: None))
# Their caches hold nothing of a model's sizes; what they compute may be slow, or allowed once only.
_LIBRARIES = ("torch", "numpy", "scipy", "growfx", "sympy", "triton", "_pytest", "pytest")
_NOT_MODELS = {*_LIBRARIES, *sys.stdlib_module_names}
_TABLES = (dict, list, set)


@contextmanager
def generators_restored(devices: list[int]) -> Generator[None]:
    """Put the generators of torch (CPU and the CUDA `devices`), numpy and Python back to where they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def python_randomness() -> tuple[Any, ...]:
    """What is another value after Python's or numpy's global generator drew a number."""
    kind, keys, position, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), kind, keys.tobytes(), position, *rest  # type: ignore[union-attr]


def _model_code(root: nn.Module) -> list[ModuleType]:
    """The loaded Python modules of the packages that the classes of a model come from."""
    packages = {type(part).__module__.partition(".")[0] for part in root.modules()} - set(_LIBRARIES)
    return [m for name, m in list(sys.modules.items()) if name.partition(".")[0] in packages and hasattr(m, "__dict__")]


@contextmanager
def tables_restored(root: nn.Module) -> Generator[None]:
    """Put dicts, lists and sets that a model's Python modules hold back to what they held.

    A table keyed by size would keep what a recording computed, which is no value, for the model's own calls.
    """
    kept = [(table, table.copy()) for module in _model_code(root) for table in _tables(module)]
    try:
        yield
    finally:
        for table, before in kept:
            if len(table) != len(before) or not _holds_same(table, before):
                _refill(table, before)


_TABLES_OF: dict[str, tuple[int, list[tuple[Any, str]]]] = {}


def _tables(module: ModuleType) -> list[Any]:
    """The tables of a module and of the classes defined there; looked for anew when the module has more names."""
    known = _TABLES_OF.get(module.__name__)
    if known is None or known[0] != len(vars(module)):
        values = list(vars(module).values())
        kinds = [kind for kind in values if isinstance(kind, type) and kind.__module__ == module.__name__]
        places = [(owner, name, value) for owner in (module, *kinds) for name, value in list(vars(owner).items())]
        known = len(vars(module)), [(owner, name) for owner, name, value in places if type(value) in _TABLES]
        _TABLES_OF[module.__name__] = known
    found = [vars(owner).get(name) for owner, name in known[1]]
    return [value for value in found if type(value) in _TABLES]


def _holds_same(table: Any, before: Any) -> bool:
    if isinstance(table, dict):
        return all(key in before and before[key] is value for key, value in table.items())
    if isinstance(table, list):
        return all(a is b for a, b in zip(table, before, strict=True))
    return table == before


def _refill(table: Any, before: Any) -> None:
    table.clear()
    table.extend(before) if isinstance(table, list) else table.update(before)


@contextmanager
def caches_bypassed() -> Generator[None]:
    """Let this thread pass by the `functools.lru_cache` of functions of models: nothing is taken from, or left in, one.

    A cache keyed by a size would hand out the result of another call, in which the size was a plain number, and would
    keep results of this one. Within the context each such function has a cache of its own.
    """
    thread = threading.get_ident()
    stand_ins: dict[int, Callable[..., Any]] = {}
    with ExitStack() as stack:
        for owner, key, cached in _all_cached_functions():
            function = cached.__func__ if isinstance(cached, staticmethod) else cached
            stand_in = stand_ins.setdefault(id(function), _bypass(function, thread))
            setattr(owner, key, staticmethod(stand_in) if function is not cached else stand_in)
            stack.callback(setattr, owner, key, cached)
        yield


_CACHED_IN: dict[str, tuple[int, list[tuple[Any, str, Any]]]] = {}


def _all_cached_functions() -> list[tuple[Any, str, Any]]:
    """`_cached_functions` of all loaded modules but libraries'; of those known, where they have no more names."""
    found: list[tuple[Any, str, Any]] = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _NOT_MODELS or not isinstance(module, ModuleType):
            continue
        known = _CACHED_IN.get(name)
        if known is None or known[0] != len(vars(module)):
            known = _CACHED_IN[name] = len(vars(module)), list(_cached_functions(module))
        found += known[1]
    return found


def _cached_functions(module: ModuleType) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, cached function or static method of one) in a module and in the classes defined there."""
    for name, value in list(vars(module).items()):
        if type(value) is _CACHED:
            yield module, name, value
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for key, member in list(vars(value).items()):
                if type(member) is _CACHED or (type(member) is staticmethod and type(member.__func__) is _CACHED):
                    yield value, key, member


def _bypass(cached: Any, thread: int) -> Callable[..., Any]:
    own: dict[Any, Any] = {}

    @functools.wraps(cached.__wrapped__)
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return cached(*args, **kwargs)
        # By identity of the arguments' types as well: a traced size and a plain number are equal.
        key = (tuple((type(v), id(v)) for v in args), tuple((k, type(v), id(v)) for k, v in kwargs.items()))
        if key not in own:
            own[key] = cached.__wrapped__(*args, **kwargs), args, kwargs  # an id is good while its object lives
        return own[key][0]

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(call, name, getattr(cached, name))
    return call


@contextmanager
def undisturbed(net: MaskedGraph) -> Generator[None]:
    """The network in training mode; afterwards modes, buffers and global generators are as they were."""
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    masks = {id(layer.mask) for layer in net.layers.values()}
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers() if id(buffer) not in masks]
    python, numpy, training = random.getstate(), np.random.get_state(), net.training  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []), in_mode(net.shell, net.training):
        try:
            net.train()
            yield
        finally:
            net.train(training)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
