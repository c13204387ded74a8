"""Example inputs of a network: stored when it is saved, remembered on the model that is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growfx.artifact.dtypes import DTYPE_NAMES, TORCH_DTYPES
from growfx.artifact.input_specs import MOST_INPUTS, InputSpec, input_complaint
from growfx.models.build import INPUTS_ATTRIBUTE
from growfx.recorded.inputs import Inputs

__all__ = ["as_example", "default_inputs", "inputs_from", "remember_inputs", "specs_of"]


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

    Truth values are all true: nothing is masked away.
    """
    generator = torch.Generator().manual_seed(0)

    def made(spec: InputSpec) -> Any:
        if spec.dtype is None:
            return spec.value
        dtype = TORCH_DTYPES[spec.dtype]
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(spec.shape, generator=generator).to(dtype)
        return torch.full(spec.shape, dtype is torch.bool, dtype=dtype)

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
