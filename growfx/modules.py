"""What is asked of any module tree: its tensors, and its mode for a while."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["chain_tensors", "in_mode", "settings_of"]


def chain_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, then buffers."""
    yield from module.parameters()
    yield from module.buffers()


def settings_of(module: nn.Module) -> int:
    """A number that is another one, as good as certainly, when a flag, number or name that a module holds is another.

    Modes and private attributes aside.
    """
    return hash(
        tuple(
            (name, key, value)
            for name, part in module.named_modules()
            for key, value in vars(part).items()
            if type(value) in _PLAIN and key[0] != "_" and key != "training"
        )
    )


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
