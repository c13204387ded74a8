"""Parameters that lie in one another's memory without being one parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from growfx.errors import ConfigError
from growfx.masked.layers import MaskedLayer
from growfx.masked.parameter import MaskedParameter

__all__ = ["refuse_shared_memory"]


def refuse_shared_memory(shell: nn.Module, layers: Iterable[MaskedLayer | MaskedParameter]) -> None:
    """Refuse a masked weight in whose memory another parameter lies, too.

    The mask of one would write zeros into the other, which computes by them or revives them.

    Raises:
        ConfigError: naming both.
    """
    masked = {id(layer.parameter) for layer in layers}
    end, last, held = -1, "", False
    for start, stop, name, parameter in sorted(_places(shell)):
        if start < end and (held or id(parameter) in masked):
            raise ConfigError(
                f"`{last}` and `{name}` are two parameters in the same memory, and one of them is to be masked; tie "
                "them by one parameter (`b.weight = a.weight`), or give each its own (`.clone()`)"
            )
        if stop > end:
            end, last, held = stop, name, id(parameter) in masked


def _places(shell: nn.Module) -> Iterator[tuple[int, int, str, Tensor]]:
    """The addresses of the parameters that have some."""
    for name, parameter in shell.named_parameters():
        if parameter.is_meta or parameter.layout is not torch.strided or not parameter.numel():
            continue
        reach = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
        start = parameter.data_ptr()
        if start:
            yield start, start + (reach + 1) * parameter.element_size(), name, parameter
