"""Example inputs of a network: stored when it is saved, remembered on the model that is loaded.

So are some numbers of what it gave on them, by which a model that is handed over is recognised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from growfx.artifact.dtypes import DTYPE_NAMES, TORCH_DTYPES
from growfx.artifact.input_specs import (
    MOST_INPUTS,
    MOST_SAMPLES,
    GivenOutputs,
    InputSpec,
    input_complaint,
    outputs_complaint,
)
from growfx.errors import TraceError, one_line
from growfx.masked.isolation import generators_restored
from growfx.masked.module_copy import copy_modules, separate_hooks
from growfx.models.build import INPUTS_ATTRIBUTE
from growfx.recorded.inputs import Inputs

__all__ = [
    "as_example",
    "default_inputs",
    "inputs_from",
    "output_difference",
    "outputs_of",
    "remember_inputs",
    "specs_of",
    "tensors_and_numbers",
]

# How far two machines may be apart, as a fraction of the largest output. On accelerators products may be rounded.
_APART = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 3e-2}
_ROUNDED, _ELSEWHERE = 1e-1, 1e-2
# Elements of all inputs together that a network is run on for this: a file that is not trusted names them.
_MOST_TO_RUN = 1 << 22


def specs_of(inputs: Inputs) -> tuple[InputSpec, ...] | None:
    """Shapes and dtypes of a call's arguments; None where they are not all tensors and plain values."""
    arguments = [*((None, value) for value in inputs.args), *inputs.kwargs.items()]
    specs = [
        InputSpec(keyword, DTYPE_NAMES.get(value.dtype, ""), tuple(value.shape))
        if isinstance(value, Tensor)
        else InputSpec(keyword, value=value)
        for keyword, value in arguments
    ]
    fit = 0 < len(specs) <= MOST_INPUTS and not any(input_complaint(s.to_json(), TORCH_DTYPES) for s in specs)
    return tuple(specs) if fit else None


def inputs_from(specs: Sequence[InputSpec]) -> Inputs:
    """Inputs of these shapes, the same in every process: noise, or zeros where the dtype is an integer's.

    Truth values are all true: nothing is masked away. On the CPU, whatever torch's default dtype and device are.
    """
    cpu = torch.device("cpu")
    generator = torch.Generator(cpu).manual_seed(0)

    def made(spec: InputSpec) -> Any:
        if spec.dtype is None:
            return spec.value
        dtype = TORCH_DTYPES[spec.dtype]
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(spec.shape, generator=generator, dtype=torch.float32, device=cpu).to(dtype)
        return torch.full(spec.shape, dtype is torch.bool, dtype=dtype, device=cpu)

    values = [(spec.keyword, made(spec)) for spec in specs]
    return Inputs(tuple(v for k, v in values if k is None), {k: v for k, v in values if k is not None})


def as_example(inputs: Inputs) -> Any:
    """Inputs as `growfx.wrap` takes them: a tuple of arguments, or that and a dict of keyword arguments."""
    return (inputs.args, dict(inputs.kwargs)) if inputs.kwargs else inputs.args


def remember_inputs(model: nn.Module, specs: Sequence[InputSpec] | None) -> nn.Module:
    """Remember the example inputs on `model`, outside its state dict; returns the model."""
    if specs is not None:
        model.__dict__[INPUTS_ATTRIBUTE] = tuple(specs)
    return model


def default_inputs(model: nn.Module) -> Inputs | None:
    """Inputs for a model that was loaded from an artifact that tells; None for others.

    Floating tensors have the dtype of the model's parameters, all are where these are.
    """
    specs = model.__dict__.get(INPUTS_ATTRIBUTE)
    if specs is None:
        return None
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    inputs = inputs_from(specs)
    return Inputs(tuple(map(placed, inputs.args)), {key: placed(value) for key, value in inputs.kwargs.items()})


def outputs_of(model: nn.Module, specs: Sequence[InputSpec] | None) -> GivenOutputs | None:
    """What a plain model gives on the inputs that `specs` tell, in eval mode; the model is not changed.

    None where it does not run on them, gives no numbers, or gives others when it is called again.
    """
    if specs is None or _too_many(specs):
        return None
    try:
        copied = _to_run(model, specs)
        with _alone(model):
            first, again = _run(copied), _run(copied)
    except Exception:  # the model's own code: it may raise anything
        return None
    given = GivenOutputs(first, _tolerance(model))
    sampled = any(samples for _, _, samples in first)
    return given if first == again and sampled and outputs_complaint(given.to_json()) is None else None


def output_difference(model: nn.Module, specs: Sequence[InputSpec], given: GivenOutputs) -> str:
    """How what a plain model gives on its example inputs differs from what was stored; "" where it does not, or where
    these inputs are too large to run it on.
    """
    if _too_many(specs):
        return ""
    try:
        with _alone(model):
            found = _run(_to_run(model, specs))
    except Exception as error:  # the model's own code
        return f"an error on them ({one_line(error)[:200]})"
    return given.difference(found, _tolerance(model))


def _too_many(specs: Sequence[InputSpec]) -> bool:
    return sum(prod(spec.shape) for spec in specs) > _MOST_TO_RUN


def _to_run(model: nn.Module, specs: Sequence[InputSpec]) -> nn.Module:
    """A copy whose runs leave nothing behind; parameters are the model's."""
    copied = copy_modules(model, {id(parameter): parameter for parameter in model.parameters()})
    separate_hooks(copied)
    for module in copied.modules():
        module.training = False  # some models do more than that in their `eval()`
    return remember_inputs(copied, specs)


@contextmanager
def _alone(model: nn.Module) -> Generator[None]:
    """Whatever block the caller is in, run without gradients and autocast; random generators are put back."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.no_grad(), torch.autocast(device.type, enabled=False), generators_restored(cuda, model):
        yield


def _run(model: nn.Module) -> tuple[tuple[tuple[int, ...], float, tuple[float, ...]], ...]:
    inputs = default_inputs(model)
    if inputs is None:
        raise TraceError("the model has no example inputs")
    outputs = model(*inputs.args, **inputs.kwargs)
    return tuple(_sampled(leaf) for leaf in tensors_and_numbers(outputs) if isinstance(leaf, Tensor))


def _sampled(output: Tensor) -> tuple[tuple[int, ...], float, tuple[float, ...]]:
    """Shape, largest magnitude and some numbers of an output; no numbers where some are not finite, or whole."""
    shape, flat = tuple(output.shape), output.detach().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    if not flat.numel() or not flat.is_floating_point() or not bool(flat.isfinite().all()):
        return shape, 0.0, ()
    places = torch.linspace(0, flat.numel() - 1, min(flat.numel(), MOST_SAMPLES), dtype=torch.float64)
    samples = flat[places.long().to(flat.device)].double().tolist()
    # digits beyond are not the same on two machines
    rounded = lambda number: float(f"{number:.6g}")  # noqa: E731
    return shape, rounded(float(flat.abs().max())), tuple(map(rounded, samples))


def _tolerance(model: nn.Module) -> float:
    floats = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    apart = [_APART.get(p.dtype.to_real() if p.is_complex() else p.dtype, _ROUNDED) for p in floats]
    return max([_APART[torch.float32], *apart, *(_ELSEWHERE for p in floats if p.device.type != "cpu")])


def tensors_and_numbers(value: Any) -> Iterator[Any]:
    """Tensors, numbers and texts in a nest of containers and dataclasses, as models return them."""
    if isinstance(value, Mapping):
        value = value.values()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value).values()
    elif not isinstance(value, (list, tuple)):
        if isinstance(value, (Tensor, int, float, str, bool)):
            yield value
        return
    for item in value:
        yield from tensors_and_numbers(item)
