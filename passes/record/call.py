"""What a recorded call looks like from outside: its operator, its plain arguments, the model's line that made it."""

from __future__ import annotations

import enum
import inspect
import operator
import sys
import types
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import base_types
from torch.utils import _pytree as pytree

from growfx.notices import OWN_FOLDERS
from growfx.passes.record.numbers import TracedFloat, TracedInt, plain

__all__ = [
    "all_can_be_written", "can_be_written", "contents", "forward_parameters", "holds_tensor", "is_own_or_torch",
    "operation", "plain_arguments", "plain_tensor_names", "source_line",
]  # fmt: skip

_WRITABLE = (
    *base_types, type, types.FunctionType, types.BuiltinFunctionType, types.EllipsisType, types.NoneType,
    enum.Enum, range, torch.Size,
)  # fmt: skip


def can_be_written(value: Any) -> bool:
    """Whether a graph can hold a value that is neither a tensor nor a container: by name or written out."""
    if isinstance(value, types.FunctionType):
        return _is_importable(value)
    return isinstance(value, (fx.Node, *_WRITABLE))


def _is_importable(function: types.FunctionType) -> bool:
    """Whether generated code can name a function; a lambda or one made inside another cannot be named."""
    found: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function


def all_can_be_written(nest: Any) -> bool:
    """Whether a graph can hold all the leaves of nested containers."""
    return all(isinstance(value, Tensor) or can_be_written(value) for value in pytree.tree_leaves(nest))


def operation(func: Any, name: str) -> tuple[str, Any]:
    """The kind and target of the fx node of a torch function."""
    if name == "__getitem__":
        return "call_function", operator.getitem
    if isinstance(func, (types.MethodDescriptorType, types.WrapperDescriptorType)) or _is_tensor_method(func, name):
        return "call_method", name
    return "call_function", func


def _is_tensor_method(func: Any, name: str) -> bool:
    return getattr(func, "__module__", None) == "torch._tensor" and hasattr(Tensor, name)


def plain_arguments(value: Any) -> Any:
    """`value` with ordinary numbers, as torch's functions want them."""
    if isinstance(value, (TracedInt, TracedFloat)):
        return plain(value)
    if isinstance(value, torch.Size):
        return torch.Size([int(v) for v in value])
    if isinstance(value, slice):
        return slice(plain_arguments(value.start), plain_arguments(value.stop), plain_arguments(value.step))
    if type(value) is tuple or type(value) is list:
        return type(value)(plain_arguments(v) for v in value)
    if type(value) is dict:
        return {k: plain_arguments(v) for k, v in value.items()}
    return value


def contents(nest: Any) -> Any:
    """What the lists, tuples and dicts in a nest hold, by identity: another value after something was written there."""
    if isinstance(nest, dict):
        return tuple((key, contents(value)) for key, value in nest.items())
    if isinstance(nest, (list, tuple)):
        return tuple(map(contents, nest))
    return id(nest)


def holds_tensor(value: Any) -> bool:
    """Whether a result is a tensor, or a list or tuple with one in it."""
    if isinstance(value, (tuple, list)):
        return any(holds_tensor(v) for v in value)
    return isinstance(value, Tensor)


def forward_parameters(module: nn.Module) -> list[str]:
    """Names of the positional parameters of a module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # a forward that is not a Python function
        return []
    return [p.name for p in parameters.values() if p.kind in kinds]


def plain_tensor_names(root: nn.Module) -> dict[int, str]:
    """Tensors that are attributes of modules without being parameters or buffers."""
    found = {}
    for name, module in root.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                found[id(value)] = f"{name}.{key}" if name else key
    return found


_NOT_THE_MODEL = (str(torch.__file__).rsplit("__init__", 1)[0], *OWN_FOLDERS)


def is_own_or_torch(file: str) -> bool:
    """Whether a source file belongs to torch or growfx, not to the model."""
    return file.startswith(_NOT_THE_MODEL)


def source_line() -> str:
    """File, line and function of the model's code that is running."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if not is_own_or_torch(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
