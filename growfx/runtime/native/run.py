"""One run of a whole network: calls of the native runtime, and torch's operators where that has no kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.errors import ConfigError
from growfx.recorded.inputs import Inputs
from growfx.runtime.native.plan import Shape, Size
from growfx.runtime.native.sessions import Sessions

__all__ = ["FAILED", "UNSERVED", "NativeCall", "NetworkRun", "Slot", "TorchCall", "is_watched"]

# What a run returns for inputs of a kind that it does not compute, and for those where a step fails.
UNSERVED: Final = object()
FAILED: Final = object()

_TORCH: Any = torch._C  # parts of it are not declared
# Tensors of one run by their number.
Values = dict[int, Tensor]


@dataclass(frozen=True)
class Slot:
    """Stands for the tensor of this number in arguments and results."""

    number: int


@dataclass(frozen=True)
class NativeCall:
    """A part of a network that the native runtime computes in one call.

    Attributes:
        sessions: what computes it.
        inputs: numbers of the tensors that it reads.
        outputs: numbers of those that it gives, and their dtypes.
        frees: numbers of tensors that nobody needs afterwards.
    """

    sessions: Sessions
    inputs: tuple[int, ...]
    outputs: tuple[tuple[int, torch.dtype], ...]
    frees: tuple[int, ...] = ()

    def run(self, values: Values, batch: int) -> None:
        """Add the outputs to `values`."""
        made = self.sessions.run(batch, [_floats(values[number]) for number in self.inputs])
        for (number, dtype), output in zip(self.outputs, made, strict=True):
            values[number] = output if dtype is torch.float32 else output.to(dtype)


@dataclass(frozen=True)
class TorchCall:
    """An operator that torch computes.

    Attributes:
        operator: its name, as in `aten.cumprod`.
        function: what to call.
        args, kwargs: its arguments, with a `Slot` for each tensor that is computed, and a `Size` for each number that
            grows with the batch.
        outputs: numbers and shapes of the tensors that it gives, None for what is not a tensor.
        writes: whether it writes into its first argument, which is copied before.
        frees: numbers of tensors that nobody needs afterwards.
    """

    operator: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[tuple[int, Shape] | None, ...]
    writes: bool = False
    frees: tuple[int, ...] = ()

    def run(self, values: Values, batch: int) -> None:
        """Add the outputs to `values`.

        Raises:
            _OtherShapeError: they have other shapes than when the network was recorded.
        """
        args, kwargs = _filled((self.args, dict(self.kwargs)), values, batch)
        if self.writes:
            args = (args[0].clone(), *args[1:])
        made = self.function(*args, **kwargs)
        listed = made if isinstance(made, (tuple, list)) else (made,)
        for output, tensor in zip(self.outputs, listed, strict=True):
            if output is not None:
                number, shape = output
                if tuple(tensor.shape) != tuple(size.at(batch) for size in shape):
                    raise _OtherShapeError
                values[number] = tensor


class _OtherShapeError(Exception):
    """A shape depends on the data."""


@dataclass(frozen=True)
class NetworkRun:
    """A network as calls, for inputs of one signature and any batch size.

    Attributes:
        signature: of the inputs that it computes, `growfx.recorded.inputs.Inputs.signature`.
        inputs: numbers of the tensors among the inputs, in order.
        calls: in the order in which they run.
        spec, leaves: what the network returns, as a tree and its leaves: a `Slot` for each tensor that is computed, a
            `Size` for each number that grows with the batch, or a value.
    """

    signature: Any
    inputs: tuple[int, ...]
    calls: tuple[NativeCall | TorchCall, ...]
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the network returns; else `UNSERVED` (inputs of another kind, or torch is watched) or `FAILED`."""
        if is_watched():
            return UNSERVED
        given = Inputs(args, kwargs)
        tensors = [value for value in given.values if isinstance(value, Tensor)]
        batch = given.batch
        if not batch or not all(map(_is_ordinary, tensors)) or given.signature != self.signature:
            return UNSERVED
        values: Values = dict(zip(self.inputs, tensors, strict=True))
        try:
            for call in self.calls:
                call.run(values, batch)
                for number in call.frees:
                    del values[number]
        except (_OtherShapeError, ConfigError, RuntimeError, IndexError, ValueError):
            return FAILED
        return pytree.tree_unflatten([_filled(leaf, values, batch) for leaf in self.leaves], self.spec)

    @property
    def native_calls(self) -> int:
        """How often the native runtime is called in one run."""
        return sum(isinstance(call, NativeCall) for call in self.calls)

    @property
    def torch_steps(self) -> Counter[str]:
        """The operators that torch computes, and how often."""
        return Counter(call.operator for call in self.calls if isinstance(call, TorchCall))

    def is_read_by_torch(self, tensor: Tensor) -> bool:
        """Whether an operator that torch computes reads a parameter, or a view of it."""
        own = tensor.untyped_storage().data_ptr()
        steps = [(call.args, call.kwargs) for call in self.calls if isinstance(call, TorchCall)]
        read = [x for x in pytree.tree_leaves(steps) if isinstance(x, Tensor)]
        return any(x.untyped_storage().data_ptr() == own for x in read)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and plans."""
        return sum(call.sessions.nbytes for call in self.calls if isinstance(call, NativeCall))

    def __deepcopy__(self, memo: dict[int, Any]) -> NetworkRun:
        return self  # it never changes


def _floats(tensor: Tensor) -> Tensor:
    """Contiguous, in float32."""
    return tensor.resolve_neg().to(torch.float32).contiguous()


def _filled(nest: Any, values: Values, batch: int) -> Any:
    """A nest with tensors and sizes in the place of `Slot` and `Size`."""
    if isinstance(nest, Slot):
        return values[nest.number]
    if isinstance(nest, Size):
        return nest.at(batch)
    if isinstance(nest, dict):
        return {key: _filled(value, values, batch) for key, value in nest.items()}
    if isinstance(nest, (tuple, list)):
        items = [_filled(value, values, batch) for value in nest]
        return tuple(items) if isinstance(nest, tuple) else items
    return nest


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether its memory holds its values, on the CPU."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not _TORCH._functorch.is_functorch_wrapped_tensor(tensor)
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def is_watched() -> bool:
    """Whether torch compiles, traces or differentiates what runs, or a mode is to see every operator."""
    return (
        torch.compiler.is_compiling()
        or _TORCH._get_tracing_state() is not None
        or _TORCH._len_torch_dispatch_stack() > 0
        or _TORCH._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
