"""What is asked of any module tree: its tensors, and its mode for a while."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["chain_tensors", "in_mode"]


def chain_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, then buffers."""
    yield from module.parameters()
    yield from module.buffers()


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
