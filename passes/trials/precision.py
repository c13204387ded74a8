"""Runs of a model in float64 throughout, whatever types its code asks for, and how far rounding alone moves outputs.

A model made `double` still computes in float32 where it says `.float()` or makes its constants so. What a change of
the model does to its outputs is then hidden below the rounding of these parts, unless they are widened too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from growfx.compaction.apply import sharing_copy
from growfx.passes.trials.convolution import is_large, piecewise
from growfx.recorded.inputs import Inputs

__all__ = [
    "largest_error", "largest_result", "outputs_of", "relative_error", "rounded_away", "tolerance_of", "widened",
    "widened_model",
]  # fmt: skip

_WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}
# How many times the effect of one rounding of every parameter another order of the same sums may have.
_TIMES = 64


class _Widened(TorchDispatchMode):
    """Every operator computes in float64 or complex128 where it would compute in less."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given: tuple[tuple[Any, ...], dict[str, Any]] = (tuple(args), dict(kwargs or {}))
        if func.is_view or func._schema.is_mutable:  # what shares memory stays what it is
            return func(*given[0], **given[1])
        inputs, options = pytree.tree_map(_wide, given)
        if not options and is_large(func, inputs):
            return piecewise(func, inputs)
        return pytree.tree_map_only(Tensor, _wide, func(*inputs, **options))


class _Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 1

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            sizes = [leaf.numel() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            self.elements = max(self.elements, *sizes, 0)
        return result


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(_WIDE[value.dtype]) if value.dtype in _WIDE else value
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def widened(wide: bool = True) -> AbstractContextManager[object]:
    """Compute in float64 throughout, on this thread; not at all where `wide` is False."""
    return _Widened() if wide else nullcontext()


def widened_model(model: nn.Module) -> nn.Module:
    """Make the parameters and buffers of a model float64 or complex128, in place."""
    return model._apply(_wide)


def outputs_of(model: nn.Module, inputs: Inputs, wide: bool = False) -> list[Tensor]:
    """All tensors that the model returns, which may write into its inputs; `wide`: in float64 throughout."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (inputs.args, dict(inputs.kwargs)))
    with torch.no_grad(), widened(wide):
        result = model(*args, **kwargs)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def largest_result(model: nn.Module, inputs: Inputs, wide: bool = False) -> int:
    """Elements of the largest tensor that the model makes on its way; 1 where it does not run under observation."""
    largest = _Largest()
    try:
        with largest:
            outputs_of(model, inputs, wide)
    except Exception:  # an operator that knows of no modes
        return 1
    return largest.elements


def tolerance_of(dtype: torch.dtype, *, reordered: bool = False) -> float:
    """The error, over the largest output, up to which outputs of this type may count as equal.

    `reordered`: of a network that takes its sums in another order, through many layers.
    """
    return (10 if reordered else 1) * _TOLERANCE.get(dtype, 1e-2)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value of `theirs`; infinite where only one of them is not a number."""
    if bool((ours.isnan() != theirs.isnan()).any()):
        return float("inf")
    kind = torch.complex128 if theirs.is_complex() or ours.is_complex() else torch.float64
    ours, theirs = ours.to(kind), theirs.to(kind)
    scale = float(theirs.abs().nan_to_num().max()) or 1.0
    # Infinities of one sign are equal; their difference is not a number.
    return float((ours - theirs).abs().nan_to_num().max()) / scale


def largest_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest `relative_error` of several outputs; infinite where their number or shapes differ."""
    if [value.shape for value in got] != [value.shape for value in expected]:
        return float("inf")
    return max((relative_error(a, b) for a, b in zip(got, expected, strict=True) if b.numel()), default=0.0)


def rounded_away(model: nn.Module, runs: Sequence[tuple[Inputs, list[Tensor]]], wide: bool) -> list[list[float]]:
    """How far outputs may move without meaning anything: a multiple of what a rounding of all numbers does to them.

    Args:
        model: the model; it is not changed.
        runs: inputs and the outputs of the model for them.
        wide: whether these are computed in float64 throughout.

    Returns:
        For every run and output the error, over the largest value of the output; never above `tolerance_of` its type.
    """
    generator = torch.Generator().manual_seed(7)

    def rounded(value: Any) -> Any:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()) or value.is_meta:
            return value
        if value.dtype.itemsize == 1:  # no arithmetic in types of 8 bits
            return value
        signs = torch.randint(2, value.shape, generator=generator, device="cpu", dtype=torch.int8) * 2 - 1
        return value * (1 + signs.to(value) * torch.finfo(value.dtype).eps)

    moved = sharing_copy(model)
    for tensor in (*moved.parameters(), *moved.buffers()):
        tensor.data = rounded(tensor.data)
    result = []
    for inputs, expected in runs:
        near = Inputs(*pytree.tree_map(rounded, (inputs.args, dict(inputs.kwargs))))
        try:
            got = outputs_of(moved, near, wide)
        except Exception:  # it checks what it is given
            got = []
        alike = [value.shape for value in got] == [value.shape for value in expected]
        result.append([_limit(theirs, got[i] if alike else None) for i, theirs in enumerate(expected)])
    return result


def _limit(theirs: Tensor, moved: Tensor | None) -> float:
    most = tolerance_of(theirs.dtype)
    if moved is None or theirs.is_meta or not theirs.numel():
        return most
    inexact = theirs.is_floating_point() or theirs.is_complex()
    rounding = torch.finfo(theirs.dtype).eps if inexact else 0.0
    return min(most, _TIMES * max(relative_error(moved, theirs), rounding))
