"""Comparing a model with its masked graph from outside: outputs, and the weights that the model's own forward uses.

Nothing here asks growfx what it recorded, so that a mistake of the recorder cannot vouch for itself.
"""

from __future__ import annotations

import inspect
import random
import weakref
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = [
    "call",
    "difference",
    "enliven",
    "leaves",
    "restored_buffers",
    "run_followed",
    "run_seeded",
    "seeded",
    "split",
    "weight_layers",
]

_TOLERANCE = 1e-5  # relative to the largest value of an output: kernels may order their sums differently
_SMALLEST_SCALE = 0.1


def enliven(model: nn.Module, seed: int = 0) -> None:
    """Give constant parameters and running statistics random values, in place.

    Fresh models hold heads and branches that are exactly or nearly zero (zero-initialised heads, LayerScale of
    1e-6); outputs would be equal for any result of such a branch.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() < 2 or not parameter.is_floating_point():
                continue
            value = float(parameter.flatten()[0])
            if not bool((parameter == value).all()):
                continue
            if value == 0:
                parameter.normal_(0, 0.05, generator=generator)
            else:
                size = max(abs(value), _SMALLEST_SCALE)
                parameter.uniform_(0.5 * size, 1.5 * size, generator=generator).mul_(1 if value > 0 else -1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)


def split(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of example inputs: a tuple, a dict of keyword arguments, or `(args, kwargs)`."""
    if isinstance(given, Mapping):
        return (), dict(given)
    if len(given) == 2 and isinstance(given[0], tuple) and isinstance(given[1], dict):
        return given
    return tuple(given), {}


def call(model: nn.Module, given: Any) -> Any:
    """What the model returns for example inputs."""
    args, kwargs = split(given)
    return model(*args, **kwargs)


def run_seeded(model: nn.Module, given: Any, training: bool, seed: int = 1) -> list[Any]:
    """The outputs of a seeded forward, flattened; buffers that it changes are put back."""
    model.train(training)
    with restored_buffers(model), seeded(seed), torch.no_grad():
        return list(leaves(call(model, given)))


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seed torch, numpy and `random`; their states are put back at the end."""
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpys)  # noqa: NPY002
            random.setstate(pythons)


@contextmanager
def restored_buffers(model: nn.Module) -> Generator[None]:
    """Put back the buffers that a forward in train mode changes."""
    saved = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta] if model.training else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def difference(expected: list[Any], got: list[Any], *, exact: bool = False, blank: bool = False) -> str:
    """How outputs differ from the expected ones; "" if they do not.

    Floats may differ by 1e-5 of the largest expected value unless `exact`. Outputs that are empty, zero, or several
    times the same number prove nothing: that is a difference, too, unless `blank` ones may come.
    """
    if len(expected) != len(got):
        return f"{len(got)} outputs instead of {len(expected)}"
    telling = False
    for index, (a, b) in enumerate(zip(expected, got, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
                return f"output {index} is {_short(b)} instead of {_short(a)}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {index} is {b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
        telling = telling or _tells(a)
        if torch.equal(a, b):
            continue
        error = float((a.double() - b.double()).abs().nan_to_num(torch.inf, torch.inf).max())
        scale = float(a.double().abs().nan_to_num().max())
        if exact or not a.is_floating_point() or not error <= _TOLERANCE * scale:
            return f"output {index} differs by {error:.2g} (largest value {scale:.2g})"
    return "" if telling or blank else "the outputs are empty, constant or not finite, so that nothing was compared"


def _tells(output: Tensor) -> bool:
    """Whether an output depends on anything, as far as one can see."""
    if not output.numel() or not bool(torch.isfinite(output).all()):
        return False
    first = output.flatten()[0]
    return bool((output != first).any()) or (output.numel() == 1 and bool(first != 0))


def weight_layers(model: nn.Module) -> Iterator[str]:
    """Names of all convolutions, linear layers and multi-head attentions of a model."""
    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear, nn.MultiheadAttention)):
            yield name


def run_followed(model: nn.Module, given: Any, training: bool) -> tuple[list[Any], set[str]]:
    """`run_seeded`, and the names of parameters that weights of convolutions, linear maps and attentions come from.

    Only weights that do not depend on the data count, and of those only matrices: a gain per unit is none. Whatever the
    model does is followed: modules, functions, its own layers.
    """
    uses = _WeightUses(model, given)
    with uses:
        outputs = run_seeded(model, given, training)
    return outputs, {name for name in uses.found if sum(size > 1 for size in model.get_parameter(name).shape) >= 2}


_LINEAR_MAPS = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"
}  # fmt: skip


class _WeightUses(TorchFunctionMode):
    """Follows which tensors come from the data and which from parameters alone."""

    def __init__(self, model: nn.Module, given: Any):
        super().__init__()
        self.found: set[str] = set()
        # By id, with a reference that says whether the id still is that tensor's; None: it depends on the data.
        self.origins: dict[int, tuple[weakref.ref[Tensor], frozenset[str] | None]] = {}
        for name, parameter in model.named_parameters():
            self._note(parameter, frozenset({name}))
        for value in leaves(given):
            if isinstance(value, Tensor):
                self._note(value, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _LINEAR_MAPS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            self._use(weight)
        elif name == "multi_head_attention_forward":
            given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
            for part in ("in_proj_weight", "out_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self._use(given.get(part))
        sources = [self._origin(tensor) for tensor in _tensors((args, kwargs))]
        result = func(*args, **kwargs)
        if sources:
            known = [source for source in sources if source is not None]
            origin = frozenset[str]().union(*known) if len(known) == len(sources) else None
            for tensor in _tensors(result):
                self._note(tensor, origin)
            if name.endswith("_") and args and isinstance(args[0], Tensor):
                self._note(args[0], origin)
        return result

    def _note(self, tensor: Tensor, origin: frozenset[str] | None) -> None:
        self.origins[id(tensor)] = weakref.ref(tensor), origin

    def _origin(self, tensor: Tensor) -> frozenset[str] | None:
        entry = self.origins.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else frozenset()

    def _use(self, weight: Any) -> None:
        if isinstance(weight, Tensor):
            self.found |= self._origin(weight) or frozenset()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


# Known as a whole, whatever they hold.
_ATOMS = (Tensor, nn.Module, Enum, str, type, weakref.ref, FunctionType, torch.device, torch.dtype)


def leaves(value: Any, without: Collection[str] = (), within: frozenset[int] = frozenset()) -> Iterator[Any]:
    """What a nest of containers and objects (dataclasses, caches, graphs) holds, in order.

    Objects of the classes named in `without` are passed over; `within` are the ids of what holds `value`.
    """
    if id(value) in within or type(value).__name__ in without:
        return
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (list, tuple)):
        items = list(value)
    elif not isinstance(value, _ATOMS) and hasattr(value, "__dict__"):
        items = list(vars(value).values())
    else:
        yield value
        return
    for item in items:
        yield from leaves(item, without, within | {id(value)})


def _short(value: Any) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]
