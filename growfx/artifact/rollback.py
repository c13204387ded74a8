"""Change a model in place, and restore it if that fails."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from itertools import chain

from torch import nn

__all__ = ["unchanged_on_error"]

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextmanager
def unchanged_on_error(model: nn.Module) -> Generator[None]:
    """Undo, if an exception leaves the block, what it did to the attributes and tensors of all modules.

    Tensors get back their storage: what was written into that in place stays written. Lists and the like that are
    attributes of a module stay the same objects; changes inside them are not undone.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    own = [vars(module)[key] for module in model.modules() for key in _REGISTRIES]
    registries = [(entries, dict(entries)) for entries in own]
    tensors = [t for t in chain(model.parameters(), model.buffers()) if not nn.parameter.is_lazy(t)]
    values = [(tensor, tensor.data) for tensor in tensors]
    gradients = [(t, t.grad, None if t.grad is None else t.grad.data) for t in tensors if t.is_leaf]
    try:
        yield
    except BaseException:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for entries, before in registries:
            entries.clear()
            entries.update(before)
        for tensor, data in values:
            tensor.data = data
        for tensor, gradient, data in gradients:
            if gradient is not None and data is not None:
                gradient.data = data  # `Module.to` casts it where it is
            tensor.grad = gradient
        raise
