"""The arguments of one call of a model: what a recording depends on, and how to vary the rest."""

from __future__ import annotations

import copy
import enum
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from growfx.errors import ConfigError, TraceError

__all__ = ["Inputs", "as_inputs", "require_input_values", "tensors_in"]

_KEYED = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format, enum.Enum)
_DEEPEST = 4  # objects within objects that tensors are looked for in


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def values(self) -> tuple[Any, ...]:
        """All arguments in the order of a recorded graph's placeholders."""
        return (*self.args, *self.kwargs.values())

    @property
    def signature(self) -> tuple[Any, ...] | None:
        """What a recording depends on: types and plain values, shapes but for the batch size, dtypes and devices.

        The batch is dimension 0 of the tensors that are arguments themselves, where all of these agree on it;
        tensors inside containers (the images of a detector) are structure. None where something else came along, of
        which nobody knows what the model reads in it: then nothing recorded before holds.
        """
        return self.keyed(batch_is_free=True)

    def keyed(self, *, batch_is_free: bool) -> tuple[Any, ...] | None:
        """`signature`, of inputs whose first dimension is a batch or is not."""
        free = batch_is_free and self.batch is not None
        try:
            named = tuple((key, _signature(value, free)) for key, value in self.kwargs.items())
            return tuple(_signature(value, free) for value in self.args), named
        except _NotKeyedError:
            return None

    @property
    def digest(self) -> str:
        """SHA-256, in hex, over the bytes of all tensors: what a recording for these very values depends on."""
        digest = hashlib.sha256()
        for tensor in tensors_in(self.values):
            if not tensor.is_meta and tensor.layout is torch.strided:
                dense = tensor.detach().cpu().resolve_conj().contiguous().reshape(-1)
                digest.update(dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b"")
        return digest.hexdigest()

    @property
    def structural(self) -> bool:
        """Whether tensors come inside containers, as the images of a detector do: their number is structure."""
        containers = [value for value in self.values if not isinstance(value, Tensor)]
        return any(True for _ in tensors_in(containers))

    @property
    def batch(self) -> int | None:
        """The batch size; None where the arguments do not have one."""
        sizes = {v.shape[0] for v in self.values if isinstance(v, Tensor) and v.ndim > 0}
        return sizes.pop() if len(sizes) == 1 else None

    def with_batch(self, batch: int) -> Inputs:
        """The same inputs with rows repeated or dropped; unchanged where there is no batch."""
        old = self.batch
        if old is None or old == 0 or old == batch:
            return self

        def resize(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0:
                return value
            return value[torch.arange(batch, device=value.device) % old]

        return Inputs(tuple(map(resize, self.args)), {k: resize(v) for k, v in self.kwargs.items()})

    def copied(self, convert: Callable[[Tensor], Any] = torch.clone) -> Inputs:
        """A copy that a forward may write into, its tensors replaced by what `convert` makes of them.

        What cannot be copied (a lock, an open file) is shared.
        """
        tensors = list(tensors_in(self.values))
        memo: dict[int, Any] = {id(tensor): convert(tensor) for tensor in tensors}
        memo[id(memo)] = tensors  # an id is good while its object lives
        try:
            return Inputs(*copy.deepcopy((self.args, dict(self.kwargs)), memo))
        except Exception:
            change = lambda value: memo.get(id(value), value)  # noqa: E731
            return Inputs(*pytree.tree_map(change, (self.args, dict(self.kwargs))))

    def redrawn(self, seed: int) -> Inputs:
        """Inputs of the same shapes with other values: noise around the float ones, rows of the others shuffled."""
        generator = torch.Generator().manual_seed(seed)

        def redraw(value: Tensor) -> Tensor:
            if value.is_meta or value.numel() == 0:
                return value
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, device="cpu").to(value)
                spread = float(value.detach().float().std()) if value.numel() > 1 else 0.0
                return value.detach() + noise * (spread or 1.0)
            return value.clone() if value.ndim == 0 else value.flip(0)

        return self.copied(redraw)


def require_input_values(inputs: Inputs, door: str) -> Inputs:
    """The inputs themselves, whose tensors have values.

    Raises:
        ConfigError: one is on the meta device.
    """
    if any(tensor.is_meta for tensor in tensors_in(inputs.values)):
        raise ConfigError(f"{door} expects `example_inputs` with values, and one is on the meta device, which has none")
    return inputs


def as_inputs(example_inputs: Any) -> Inputs:
    """The call that `example_inputs` stand for: a tensor, a tuple, a dict of keyword arguments, or (args, kwargs).

    Raises:
        TraceError: anything else.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, dict) and all(isinstance(name, str) for name in example_inputs):
        return Inputs((), example_inputs)
    if isinstance(example_inputs, tuple):
        if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], dict):
            return Inputs(*example_inputs)
        return Inputs(example_inputs, {})
    raise TraceError(
        f"expected example_inputs to be a tensor, a tuple of arguments, a dict of keyword arguments or a pair "
        f"(args, kwargs), got {type(example_inputs).__name__}"
    )


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """The tensors in nested containers and in the attributes of objects."""
    seen: set[int] = set()

    def walk(value: Any, depth: int) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
            return
        if isinstance(value, (*_KEYED, type)) or depth > _DEEPEST or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            items: Any = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            items = value
        else:
            items = vars(value).values() if hasattr(value, "__dict__") else ()
            depth += 1
        for item in list(iter(items)):  # a tuple subclass may have no length
            yield from walk(item, depth)
        if isinstance(value, Mapping) and hasattr(value, "__dict__"):
            for item in list(vars(value).values()):
                yield from walk(item, depth + 1)

    yield from walk(nest, 0)


class _NotKeyedError(Exception):
    """An argument that no recording can be kept for."""


def _signature(value: Any, batch_is_free: bool) -> Any:
    if isinstance(value, Tensor):
        shape = tuple(value.shape[1:]) if batch_is_free else tuple(value.shape)
        return value.ndim, shape, value.dtype, value.device
    if type(value) in (list, tuple):
        return type(value), tuple(_signature(v, False) for v in value)
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return dict, tuple((k, _signature(v, False)) for k, v in value.items())
    if isinstance(value, _KEYED):
        return type(value), value
    raise _NotKeyedError
