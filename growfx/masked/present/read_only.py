"""A weight that is built for whoever reads it: writing to it would be lost, so it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from growfx.errors import MaskError

__all__ = ["ReadOnlyWeight"]


class ReadOnlyWeight(Tensor):
    """A tensor of values that are kept elsewhere; results of functions of it are plain tensors.

    Attributes:
        grad: the whole gradient of the parameter behind it, a copy; None where there is none.
    """

    _gradient: Callable[[], Tensor | None]
    _name: str

    @classmethod
    def of(cls, weight: Tensor, gradient: Callable[[], Tensor | None], name: str) -> ReadOnlyWeight:
        """`weight` for reading, of the layer `name`."""
        found = cast(ReadOnlyWeight, weight.as_subclass(cls))
        found._gradient, found._name = gradient, name
        return found

    @property
    def grad(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The gradient, zero at absent edges."""
        return self._gradient()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_plain().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_plain().detach().clone().__reduce_ex__(protocol)

    def as_plain(self) -> Tensor:
        """The same as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for written in _written(func, args, kwargs):
            if isinstance(written, ReadOnlyWeight):
                raise MaskError(
                    f"the weight of `{written._name}` is read-only: its values are kept for present edges only "
                    '(`storage` = "present"); write to `layer.values`, load a state dict, or call '
                    '`growfx.use_kernels(net, storage="dense")` first'
                )
        given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, ReadOnlyWeight)]
        args, kwargs = pytree.tree_map_only(ReadOnlyWeight, ReadOnlyWeight.as_plain, (args, kwargs))
        result = func(*args, **kwargs)
        if type(result) in (list, tuple):  # of parts, as of `weight.unbind()`; a shape is none of these
            return type(result)(_guarded(part, given) for part in result)
        return _guarded(result, given)


def _guarded(result: Any, given: list[ReadOnlyWeight]) -> Any:
    """`result`, read-only too where it is a view of one of the weights `given` (`weight.data`, `weight[0]`)."""
    if type(result) is not Tensor or result.layout != torch.strided:
        return result
    memory = result.untyped_storage().data_ptr()
    for weight in given:
        if memory and weight.as_plain().untyped_storage().data_ptr() == memory:
            return ReadOnlyWeight.of(result, lambda: None, weight._name)
    return result


_IN_PLACE = {
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or")),
    *("__ixor__", "__ilshift__", "__irshift__", "__setitem__", "__set__"),
}


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that a function of torch writes to."""
    name = getattr(func, "__name__", "")
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or bool(kwargs.get("inplace"))
    first = [*args, *kwargs.values()][:1] if in_place else []
    return [*pytree.tree_leaves(kwargs.get("out")), *first]
