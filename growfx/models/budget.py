"""Limit what a model builder may build when its arguments come from a file.

A few bytes of arguments can ask for a million layers. What is stored says how large the network is, so a builder
that registers far more modules, tensors or elements than that, or calls torch far more often than it takes to
initialise them, is stopped while it does.
"""

import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from growfx.errors import ConfigError

__all__ = ["BudgetExceeded", "build_budget"]

# Heads that are replaced, modules without tensors, tables that are not stored (attention masks, positions).
_FACTOR = 4
_SPARE_NAMES = 5_000
_SPARE_ELEMENTS = 1 << 27
# Initialisers take some ten calls per tensor.
_CALLS_PER_NAME = 100
_SPARE_CALLS = 20_000
# One call, as many Python objects as the tensor has elements.
_MAKING_MANY = {"__iter__", "chunk", "split", "tolist", "unbind"}


class BudgetExceeded(ConfigError):  # noqa: N818 - a reason to stop, told as a ConfigError
    """A builder makes a network far larger than the one stored; trying it another way would not help."""


class _CountedCalls(TorchFunctionMode):
    """Stops after so many calls of torch functions."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self._left = left

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if getattr(func, "__name__", "") in _MAKING_MANY and isinstance(args[0], Tensor):
            self._left -= args[0].numel()
        if self._left < 0:
            raise _too_large()
        return func(*args, **(kwargs or {}))


def _too_large() -> BudgetExceeded:
    return BudgetExceeded("its arguments build a network far larger than the one stored")


@contextmanager
def build_budget(names: int, elements: int) -> Generator[None]:
    """Stop a builder that makes much more than `names` tensors of `elements` elements in all.

    Raises:
        BudgetExceeded: from within the builder, when it does.
    """
    thread = threading.get_ident()
    left = [_FACTOR * names + _SPARE_NAMES, _FACTOR * elements + _SPARE_ELEMENTS]

    def spend(_module: nn.Module, _name: str, value: Any) -> None:
        # The hooks see every thread's modules.
        if threading.get_ident() == thread:
            left[0] -= 1
            left[1] -= value.numel() if isinstance(value, Tensor) and not nn.parameter.is_lazy(value) else 0
            if min(left) < 0:
                raise _too_large()

    with ExitStack() as stack:
        for register in (
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
            register_module_module_registration_hook,
        ):
            handle: Any = register(spend)
            stack.callback(handle.remove)
        stack.enter_context(_CountedCalls(_CALLS_PER_NAME * names + _SPARE_CALLS))
        yield
