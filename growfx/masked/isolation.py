"""Run a model's code and leave the process as it was: random generators, caches, tables kept in modules."""

from __future__ import annotations

import functools
import random
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from growfx.masked.graph import MaskedGraph
from growfx.masked.modules import in_mode

__all__ = [
    "caches_bypassed",
    "clock_shifted",
    "enrolled",
    "generators_restored",
    "own_generators",
    "python_randomness",
    "tables_restored",
    "undisturbed",
]

_CACHED = type(functools.lru_cache(lambda: None))
# Their caches hold nothing of a model's sizes; what they compute may be slow, or allowed once only.
_LIBRARIES = ("torch", "numpy", "scipy", "growfx", "sympy", "triton", "_pytest", "pytest")
_NOT_MODELS = {*_LIBRARIES, *sys.stdlib_module_names}
_TABLES = (dict, list, set)
_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def generators_restored(devices: list[int], root: nn.Module | None = None) -> Generator[None]:
    """Put the generators of torch (CPU and the CUDA `devices`), numpy and Python back to where they were.

    Those too that the model `root` holds in attributes, or its code in globals and closures.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    own = [(generator, _state_of(generator)) for generator in ([] if root is None else own_generators(root))]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            for generator, state in own:
                _set_generator(generator, state)


_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def own_generators(root: nn.Module) -> list[Any]:
    """Generators of random numbers that a model has: in attributes, and in what the code of its classes names."""
    found: dict[int, Any] = {}
    for part in root.modules():
        found |= {id(value): value for value in vars(part).values() if _draws(value)}
    for kind in _model_classes(root):
        for member in list(vars(kind).values()):
            found |= {id(value): value for value in _named_by(member) if _draws(value)}
    return list(found.values())


def _draws(value: Any) -> bool:
    return isinstance(value, _GENERATORS) and not isinstance(value, random.SystemRandom)


def _named_by(member: Any) -> Iterator[Any]:
    """A class attribute itself; of a function, also the globals that it names and what it closes over."""
    yield member
    function = getattr(member, "__func__", member)
    if isinstance(function, FunctionType):
        yield from (function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__)
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # empty
                yield cell.cell_contents


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.bit_generator.state


def _set_generator(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def python_randomness(others: Sequence[Any] = ()) -> tuple[Any, ...]:
    """What is another value after Python's or numpy's global generator, or one of the `others`, drew a number."""
    kind, keys, position, *rest = np.random.get_state()  # noqa: NPY002
    states = [state.tolist() if isinstance(state, torch.Tensor) else repr(state) for state in map(_state_of, others)]
    return random.getstate(), kind, keys.tobytes(), position, *rest, *states  # type: ignore[union-attr]


_CLOCKS = ("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time")
_SHIFT = 123456789.678  # seconds, some years; not a whole number of any unit


@contextmanager
def clock_shifted() -> Generator[None]:
    """Let this thread read another time than it is: what a model computes from it becomes another value."""
    thread = threading.get_ident()

    def shifted(clock: Callable[[], Any], shift: Any) -> Callable[[], Any]:
        return lambda: clock() + (shift if threading.get_ident() == thread else 0)

    before = {name: getattr(time, name) for name in _CLOCKS}
    for name, clock in before.items():
        setattr(time, name, shifted(clock, int(_SHIFT * 1e9) if name.endswith("_ns") else _SHIFT))
    try:
        yield
    finally:
        for name, clock in before.items():
            setattr(time, name, clock)


def _model_code(root: nn.Module) -> list[ModuleType]:
    """The loaded Python modules of the packages that the classes of a model come from."""
    packages = {type(part).__module__.partition(".")[0] for part in root.modules()} - set(_LIBRARIES)
    loaded = _loaded_names()
    modules = [sys.modules.get(name) for package in packages for name in loaded.get(package, ())]
    return [module for module in modules if isinstance(module, ModuleType)]


_loaded: tuple[tuple[str, ...], dict[str, list[str]]] = ((), {})


def _loaded_names() -> dict[str, list[str]]:
    """Names of the loaded modules by their package; sorted anew where others are loaded: thousands are, by then."""
    global _loaded  # one value, replaced as a whole: threads may read the one before
    known, packages = _loaded
    names = tuple(sys.modules)
    if names != known:
        packages = {}
        for name in names:
            packages.setdefault(name.partition(".")[0], []).append(name)
        _loaded = names, packages
    return packages


@contextmanager
def tables_restored(root: nn.Module, original: nn.Module) -> Generator[None]:
    """Put dicts, lists and sets that a model's Python modules hold back to what they held.

    A table keyed by size would keep what a recording computed, which is not a value, for the model's own calls.

    Args:
        root: the model that is run, a copy of `original`: meanwhile registries of modules that hold parts of the
            original hold those of the copy alone.
        original: the model it is a copy of.
    """
    classes = _model_classes(root)
    tables = [table for module in _model_code(root) for table in _tables(module)]
    tables += [value for kind in classes for value in vars(kind).values() if type(value) in _TABLES]
    kept = [(table, table.copy()) for table in {id(table): table for table in tables}.values()]
    counters = [(kind, {k: v for k, v in vars(kind).items() if type(v) in _PLAIN}) for kind in classes]
    for table, parts in _registered([table for table, _ in kept], original, root):
        _refill(table, parts)
    try:
        yield
    finally:
        for table, before in kept:
            if len(table) != len(before) or not _holds_same(table, before):
                _refill(table, before)
        for kind, values in counters:  # a class that counts its calls
            for name, value in values.items():
                if vars(kind).get(name) is not value:
                    setattr(kind, name, value)


@contextmanager
def enrolled(original: nn.Module, copied: nn.Module) -> Generator[None]:
    """Add the parts of a copied model to every registry of modules that holds the originals; not if the block fails.

    Classes that list their instances when they are made (to reset them all) know nothing of copies.
    """
    tables = [table for module in _model_code(original) for table in _tables(module)]
    found = _registered(tables, original, copied)
    for table, parts in found:
        table.extend(parts) if isinstance(table, list) else table.update(parts)
    try:
        yield
    except BaseException:
        for table, parts in found:
            added = set(map(id, parts))
            _refill(table, [value for value in table if id(value) not in added])
        raise


def _registered(tables: list[Any], original: nn.Module, copied: nn.Module) -> list[tuple[Any, list[nn.Module]]]:
    """Registries (lists and sets of nothing but modules) that hold parts of a model, and those parts of a copy."""
    tables = [t for t in tables if t and not isinstance(t, dict) and all(isinstance(value, nn.Module) for value in t)]
    if not tables:
        return []
    parts = dict(copied.named_modules(remove_duplicate=False))
    named = original.named_modules(remove_duplicate=False)
    twins = {id(part): parts[name] for name, part in named if name in parts and parts[name] is not part}
    found = [(table, [twins[id(value)] for value in table if id(value) in twins]) for table in tables]
    return [(table, twin) for table, twin in found if twin]


def _model_classes(root: nn.Module) -> list[type]:
    """The classes that a model's modules are of, libraries' left out."""
    kinds = {kind: None for part in root.modules() for kind in type(part).__mro__}
    return [kind for kind in kinds if kind.__module__.partition(".")[0] not in {*_LIBRARIES, "builtins"}]


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
def caches_bypassed(root: nn.Module) -> Generator[None]:
    """Let this thread pass by the `functools.lru_cache` of functions of models: nothing is taken from, or left in, one.

    Those of all loaded modules, and of the classes of `root` wherever these were made.

    A cache keyed by a size would hand out the result of another call, in which the size was a plain number, and would
    keep results of this one. Within the context each such function has its own cache.
    """
    thread = threading.get_ident()
    stand_ins: dict[int, Callable[..., Any]] = {}
    with ExitStack() as stack:
        found = _all_cached_functions()
        known = {(id(owner), key) for owner, key, _ in found}
        of_classes = [place for kind in _model_classes(root) for place in _cached_in_class(kind)]
        for owner, key, cached in [*found, *(p for p in of_classes if (id(p[0]), p[1]) not in known)]:
            function = cached.__func__ if isinstance(cached, staticmethod) else cached
            stand_in = stand_ins.setdefault(id(function), _bypass(function, thread))
            setattr(owner, key, staticmethod(stand_in) if function is not cached else stand_in)
            stack.callback(setattr, owner, key, cached)
        yield


_CACHED_IN: dict[str, tuple[int, list[tuple[Any, str, Any]]]] = {}


def _all_cached_functions() -> list[tuple[Any, str, Any]]:
    """`_cached_functions` of all loaded modules but libraries'; of those known, where they have no more names."""
    found: list[tuple[Any, str, Any]] = []
    loaded = _loaded_names()
    for name in (name for package, names in loaded.items() if package not in _NOT_MODELS for name in names):
        module = sys.modules.get(name)
        if not isinstance(module, ModuleType):
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
            yield from _cached_in_class(value)


def _cached_in_class(kind: type) -> Iterator[tuple[type, str, Any]]:
    for key, member in list(vars(kind).items()):
        if type(member) is _CACHED or (type(member) is staticmethod and type(member.__func__) is _CACHED):
            yield kind, key, member


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
