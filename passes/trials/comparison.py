"""Compare the outputs of a transformed model with the original's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.errors import TraceError
from growfx.passes.trials.precision import outputs_of, relative_error, rounded_away, widened_model
from growfx.recorded.inputs import Inputs

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["Trial", "difference", "example_of", "trials_in_types_of", "trials_of", "with_rows", "working_copy"]


# Inputs of another size are not tried where they have more elements than these: activations have many times as many.
_ELEMENTS = 1 << 21


class Trial(NamedTuple):
    """Inputs, the outputs of the model for them, and how far another model's may be from these.

    Attributes:
        inputs: what the model is called with.
        outputs: all tensors that it returned.
        tolerances: for each output the largest error over its largest value; none where nothing has values.
        wide: whether the outputs were computed in float64 throughout.
    """

    inputs: Inputs
    outputs: list[Tensor]
    tolerances: list[float]
    wide: bool


def example_of(net: MaskedGraph, example_inputs: Any) -> Inputs:
    """The inputs given, or those recorded."""
    return net.inputs_like(example_inputs)


def with_rows(inputs: Inputs, rows: int) -> Inputs:
    """The inputs with another batch size; unchanged where vectors are all there is, for they have features alone."""
    tensors = [leaf for leaf in pytree.tree_leaves((inputs.args, dict(inputs.kwargs))) if isinstance(leaf, Tensor)]
    flat = any(leaf.is_floating_point() for leaf in tensors) and all(leaf.ndim < 2 for leaf in tensors)
    return inputs if flat else inputs.with_batch(rows)


def working_copy(model: nn.Module, example: Inputs) -> tuple[nn.Module, list[Trial]]:
    """A copy of the model in float64, or in its own type where it does not run in that, and inputs with outputs.

    The outputs are compared as exactly as the type allows: where the model's own code asks for less than float64, it
    is given float64 all the same.
    """
    candidates = [with_rows(example, 2).redrawn(seed) for seed in (1, 2)]
    work = widened_model(copy.deepcopy(model))
    for wide in (True, False):
        try:
            return work, _with_another_size(work, trials_of(work, [_as_double(inputs) for inputs in candidates], wide))
        except Exception:  # types written into the model
            continue
    return model, _with_another_size(model, trials_of(model, candidates))


def _with_another_size(model: nn.Module, trials: list[Trial]) -> list[Trial]:
    """The trials, and one with images of another size where the model takes one: of half the size, or larger."""
    inputs, outputs, _, wide = trials[0]
    finite = all(bool(value.isfinite().all()) for value in outputs)
    for sizes in (_half, _larger):
        other = _resized(inputs, sizes)
        if other is not None and sum(v.numel() for v in other.args if isinstance(v, Tensor)) > _ELEMENTS:
            continue
        try:
            result = [] if other is None else outputs_of(model, other, wide)
        except Exception:  # its sizes are fixed
            continue
        if other is not None and finite == all(bool(value.isfinite().all()) for value in result):
            return [*trials, *_judged(model, [(other, result)], wide)]
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
        return torch.randn((*value.shape[:2], *sizes), generator=generator, device="cpu").to(value)

    args = tuple(map(resized, inputs.args))
    shapes = [[value.shape for value in values if isinstance(value, Tensor)] for values in (args, inputs.args)]
    return Inputs(args, inputs.kwargs) if shapes[0] != shapes[1] and not inputs.structural else None


def trials_in_types_of(example: Inputs, model: nn.Module, trials: Sequence[Trial]) -> list[Trial]:
    """The same inputs in the types in which the example calls the model, with the model's outputs.

    Raises:
        TraceError: it does not take the first.
    """
    cast = lambda v, like: v.to(like.dtype) if isinstance(v, Tensor) else v  # noqa: E731
    types = (example.args, dict(example.kwargs))
    given = [pytree.tree_map(cast, (trial.inputs.args, dict(trial.inputs.kwargs)), types) for trial in trials]
    return trials_of(model, [Inputs(*call) for call in given])


def trials_of(model: nn.Module, candidates: Sequence[Inputs], wide: bool = False) -> list[Trial]:
    """Inputs that the model takes with its outputs; `wide`: computed in float64 throughout.

    Raises:
        TraceError: it does not take the first.
    """
    runs: list[tuple[Inputs, list[Tensor]]] = []
    for inputs in candidates:
        try:
            runs.append((inputs, outputs_of(model, inputs, wide)))
        except Exception as error:
            if not runs:
                raise TraceError(f"the network does not run on the example inputs: {_first_line(error)}") from error
    return _judged(model, runs, wide)


def _judged(model: nn.Module, runs: Sequence[tuple[Inputs, list[Tensor]]], wide: bool) -> list[Trial]:
    limits = rounded_away(model, runs, wide)
    return [Trial(*run, tolerances, wide) for run, tolerances in zip(runs, limits, strict=True)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def difference(model: nn.Module, trials: Sequence[Trial]) -> tuple[float, str]:
    """The largest error of the outputs over the largest output, and what is wrong, if anything is."""
    largest = 0.0
    for inputs, expected, tolerances, wide in trials:
        try:
            got = outputs_of(model, inputs, wide)
        except Exception as error:
            return largest, f"the model fails without it: {_first_line(error)}"
        if [value.shape for value in got] != [value.shape for value in expected]:
            return largest, "the outputs would have another shape"
        for ours, theirs, tolerance in zip(got, expected, tolerances, strict=True):
            if theirs.is_meta or not theirs.numel():
                continue
            error = relative_error(ours, theirs)
            if error > tolerance:
                return error, f"the outputs would differ by {error:.2g} of the largest"
            largest = max(largest, error)
    return largest, ""
