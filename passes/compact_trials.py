"""Inputs to try a changed model on, and how far its outputs are from those of the model it was made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.errors import TraceError
from growfx.inputs import Inputs

if TYPE_CHECKING:
    from growfx.graph import MaskedGraph

__all__ = [
    "Trial",
    "difference",
    "example_of",
    "outputs_of",
    "relative_error",
    "tolerance_of",
    "trials_of",
    "working_copy",
]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

Trial = tuple[Inputs, list[Tensor]]


def example_of(net: MaskedGraph, example_inputs: Any) -> Inputs:
    """The inputs given, or those recorded."""
    if example_inputs is None:
        return Inputs(net.example_inputs(), {})
    return Inputs((example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs), {})


def working_copy(model: nn.Module, example: Inputs) -> tuple[nn.Module, list[Trial]]:
    """A copy of the model in float64, or in its own type where it does not run in that, and inputs with outputs."""
    candidates = [example.with_batch(2).redrawn(seed) for seed in (1, 2)]
    try:
        work = copy.deepcopy(model).double()
        return work, _with_another_size(work, trials_of(work, [_as_double(inputs) for inputs in candidates]))
    except Exception:  # types written into the model
        return model, _with_another_size(model, trials_of(model, candidates))


def _with_another_size(model: nn.Module, trials: list[Trial]) -> list[Trial]:
    """The trials, and one with images of another size where the model takes one: of half the size, or larger."""
    inputs, outputs = trials[0]
    finite = all(bool(value.isfinite().all()) for value in outputs)
    for sizes in (_half, _larger):
        other = _resized(inputs, sizes)
        try:
            result = [] if other is None else outputs_of(model, other)
        except Exception:  # its sizes are fixed
            continue
        if other is not None and finite == all(bool(value.isfinite().all()) for value in result):
            return [*trials, (other, result)]
    return trials


def _as_double(inputs: Inputs) -> Inputs:
    double = lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return Inputs(*pytree.tree_map(double, (inputs.args, dict(inputs.kwargs))))


def _half(size: int) -> int:
    """About half of a size that is large enough to be halved, in steps of 32; others stay."""
    return max(64, size // 64 * 32) if size >= 128 else size


def _larger(size: int) -> int:
    """Half as large again, in steps of 32; twice as large where it is small."""
    return size + max(size // 2 // 32 * 32, min(size, 32))


def _resized(inputs: Inputs, change: Callable[[int], int]) -> Inputs | None:
    """Noise in the place of images, of other sizes; None where nothing is of another size."""
    generator = torch.Generator().manual_seed(3)

    def resized(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim < 4:
            return value
        sizes = [change(size) for size in value.shape[2:]]
        return torch.randn((*value.shape[:2], *sizes), generator=generator).to(value)

    args = tuple(map(resized, inputs.args))
    shapes = [[value.shape for value in values if isinstance(value, Tensor)] for values in (args, inputs.args)]
    return Inputs(args, inputs.kwargs) if shapes[0] != shapes[1] and not inputs.structural else None


def trials_of(model: nn.Module, candidates: Sequence[Inputs]) -> list[Trial]:
    """Inputs that the model takes, in its own type, with its outputs.

    Raises:
        TraceError: it does not take the first.
    """
    first = next(iter(model.parameters()), torch.empty(0))
    move = lambda v: v.to(first.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    trials: list[Trial] = []
    for inputs in candidates:
        inputs = Inputs(*pytree.tree_map(move, (inputs.args, dict(inputs.kwargs))))
        try:
            trials.append((inputs, outputs_of(model, inputs)))
        except Exception as error:
            if not trials:
                raise TraceError(f"the network does not run on the example inputs: {_first_line(error)}") from error
    return trials


def outputs_of(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that the model returns."""
    with torch.no_grad():
        result = model(*inputs.args, **inputs.kwargs)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def difference(model: nn.Module, trials: Sequence[Trial]) -> tuple[float, str]:
    """The largest error of the outputs over the largest output, and what is wrong, if anything is."""
    largest = 0.0
    for inputs, expected in trials:
        try:
            got = outputs_of(model, inputs)
        except Exception as error:
            return largest, f"the model fails without it: {_first_line(error)}"
        if [value.shape for value in got] != [value.shape for value in expected]:
            return largest, "the outputs would have another shape"
        for ours, theirs in zip(got, expected, strict=True):
            if theirs.is_meta or not theirs.numel():
                continue
            error = relative_error(ours, theirs)
            if error > tolerance_of(theirs.dtype):
                return error, f"the outputs would differ by {error:.2g} of the largest"
            largest = max(largest, error)
    return largest, ""


def tolerance_of(dtype: torch.dtype) -> float:
    """The error, over the largest output, up to which outputs of this type count as equal."""
    return _TOLERANCE.get(dtype, 1e-2)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value of `theirs`; infinite where only one of them is not a number."""
    if bool((ours.isnan() != theirs.isnan()).any()):
        return float("inf")
    scale = float(theirs.abs().double().nan_to_num().max()) or 1.0
    return float((ours.double() - theirs.double()).abs().nan_to_num().max()) / scale
