"""Whether the forward hooks of a module that is recorded as one node change what it computes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["HookChangesValuesError", "has_forward_hooks", "without_changes"]


class HookChangesValuesError(BaseException):
    """A hook changes a module's inputs or outputs. A BaseException, so that the model's own code lets it pass."""


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs forward hooks: its own, or those of all modules of the process."""
    of_all = nn.modules.module
    if of_all._global_backward_hooks or of_all._global_backward_pre_hooks:
        return False  # with those nothing can be told by which tensors are handed on
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
    )


def without_changes(call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call a module whose hooks only look on, or set the module's own attributes.

    Raises:
        HookChangesValuesError: its forward gets other inputs than the module is called with, or the call returns
            something else than the forward does, in place or not.
    """
    forward = module.forward
    before = _identities((args, kwargs))
    seen: list[Any] = []

    def watched(*given: Any, **named: Any) -> Any:
        entered = _identities((given, named))
        output = forward(*given, **named)
        seen[:] = [entered, _identities(output), output]  # which is kept, or its id could become another's
        return output

    # Backward hooks would hand other tensors on, of the same values.
    attributes = {"forward": watched, "_backward_hooks": OrderedDict(), "_backward_pre_hooks": OrderedDict()}
    with _attributes_replaced(module, attributes):
        value = call(module, *args, **kwargs)
    if seen and (seen[0] != before or seen[1] != _identities(value)):
        raise HookChangesValuesError
    return value


@contextmanager
def _attributes_replaced(module: nn.Module, attributes: dict[str, Any]) -> Generator[None]:
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    module.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del module.__dict__[name]
        module.__dict__.update(before)


def _identities(nest: Any) -> list[tuple[int, int]]:
    """Of the tensors in it, and how often they were written to."""
    tensors = [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, Tensor)]
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
