"""What is asked of any module tree: its tensors, and its mode for a while."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from growfx.masked.layers import MaskedLayer

__all__ = ["cast_floating", "chain_tensors", "float_type", "in_format_of", "in_mode", "settings_of"]


def chain_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, then buffers."""
    yield from module.parameters()
    yield from module.buffers()


def cast_floating(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give floating-point parameters and buffers another type, in place; `module.to` drops imaginary parts, too."""
    return module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def float_type(module: nn.Module) -> torch.dtype | None:
    """The type of the first floating-point parameter or buffer, the one that `module.double()` changes; or None."""
    return next((tensor.dtype for tensor in chain_tensors(module) if tensor.is_floating_point()), None)


def in_format_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor laid out channels last where another of as many dimensions is; else the tensor itself."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(tensor.ndim) if tensor.ndim == like.ndim else None
    if last is None or like.is_contiguous() or not like.is_contiguous(memory_format=last):
        return tensor
    return tensor.contiguous(memory_format=last)


def settings_of(module: nn.Module, states: Collection[str] = ()) -> int:
    """A number that is another one, as good as certainly, when a flag, number or name that a module holds is another.

    Forward hooks, those of all modules of the process included, a replaced forward and the types of parameters count;
    modes and private attributes do not, nor what a masked layer adds.

    Args:
        module: the root.
        states: full names of attributes to leave out.
    """
    of_all = nn.modules.module
    found: list[Any] = [tuple(of_all._global_forward_hooks), tuple(of_all._global_forward_pre_hooks)]
    for name, part in module.named_modules():
        own = part.twin_of.__name__ if isinstance(part, MaskedLayer) else type(part).__name__
        types = frozenset(tensor.dtype for tensor in part._parameters.values() if tensor is not None)
        found.append((name, own, types, *map(tuple, (part._forward_hooks, part._forward_pre_hooks))))
        for key, value in vars(part).items():
            if key[0] == "_" or key in _NO_SETTINGS or f"{name}.{key}".lstrip(".") in states:
                continue
            if type(value) in _PLAIN or key == "forward":
                found.append((key, value if type(value) in _PLAIN else id(value)))
    return hash(tuple(found))


_NO_SETTINGS = {"training", *vars(MaskedLayer), "weight_name", "mask_name"}
_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Generator[None]:
    """`module` in train or eval mode; afterwards every submodule is in the mode it was in."""
    before = [(m, m.training) for m in module.modules()]
    if module.training != training:
        module.train(training)
    try:
        yield
    finally:
        for m, flag in before:
            m.training = flag
