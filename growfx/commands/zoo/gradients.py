"""Comparing a network with the model it was made of in what training sees: outputs and gradients of one seeded call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growfx.commands.zoo.outputs import call, difference, leaves, restored_buffers, seeded

__all__ = ["Step", "reached_matrices", "step", "step_difference"]

_TOLERANCE = 1e-4  # relative: a gradient sums over batch and positions, in whatever order kernels take
_SMALLEST_SHARE = 1e-2  # of the largest gradient anywhere: what is far below is rounding


@dataclass
class Step:
    """Outputs of a call, flattened, and the gradient of each parameter by name; None where none reaches it."""

    outputs: list[Any]
    gradients: dict[str, Tensor | None]


def step(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    given: Any,
    seed: int,
    training: bool | None = None,
    without: Collection[str] = (),
) -> Step:
    """Call a model and run backward from a fixed random projection of all its outputs.

    Args:
        model: what is called; its parameters' own gradients are gone afterwards, its buffers as before.
        parameters: name -> parameter whose gradient is wanted.
        given: example inputs (see `zoo_compare.split`).
        seed: of torch, numpy and `random` during the call.
        training: mode to switch the model to; None leaves its modes alone.
        without: names of classes whose objects in the output are passed over.
    """
    if training is not None:
        model.train(training)
    for parameter in parameters.values():
        parameter.grad = None
    with restored_buffers(model), seeded(seed):
        outputs = list(leaves(call(model, given), without))
        loss = _projected(outputs)
        if loss is not None:
            loss.backward()
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return Step([o.detach() if isinstance(o, Tensor) else o for o in outputs], gradients)


def step_difference(expected: Step, got: Step) -> str:
    """How outputs or gradients differ from the expected ones; "" if they do not."""
    problem = difference(expected.outputs, got.outputs)
    if problem:
        return problem
    known = [g for g in expected.gradients.values() if g is not None]
    floor = _SMALLEST_SHARE * max((_size(g) for g in known), default=0.0)
    wrong: list[str] = []
    for name, gradient in expected.gradients.items():
        other = got.gradients.get(name)
        if gradient is None or other is None:
            # None and zeros are the same step
            if max((_size(g) for g in (gradient, other) if g is not None), default=0.0) > floor:
                wrong.append(f"`{name}` has {'a' if gradient is None else 'no'} gradient")
            continue
        error = _size(gradient.detach().to_dense() - other.detach().to_dense())
        if not error <= _TOLERANCE * max(_size(gradient), floor):
            wrong.append(f"the gradient of `{name}` differs by {error:.2g} (largest value {_size(gradient):.2g})")
    return f"{len(wrong)} of {len(expected.gradients)} gradients: {wrong[0]}" if wrong else ""


def reached_matrices(model: nn.Module, steps: list[Step]) -> set[str]:
    """Names of matrices and kernels that a gradient reached in any of the steps.

    Embeddings and the weights of norms are left out: nothing is to mask there. Vectors in more dimensions, such as
    class tokens and gains, are not matrices.
    """
    reached = {name for one in steps for name, gradient in one.gradients.items() if gradient is not None}
    found: set[str] = set()
    for name in reached:
        owner = model.get_submodule(name.rpartition(".")[0])
        matrix = sum(size > 1 for size in model.get_parameter(name).shape) >= 2
        if matrix and not (_is_embedding(owner) or _is_norm(owner)):
            found.add(name)
    return found


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _is_norm(module: nn.Module) -> bool:
    kinds = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm")
    return any(kind in type(module).__name__ for kind in kinds) and not list(module.children())


def _projected(outputs: list[Any]) -> Tensor | None:
    """A sum over all outputs with fixed random factors; None where no gradient comes out."""
    generator = torch.Generator().manual_seed(0)
    total: Tensor | None = None
    for output in outputs:
        if isinstance(output, Tensor) and output.numel() and (output.is_floating_point() or output.is_complex()):
            real = torch.view_as_real(output) if output.is_complex() else output
            # Drawn for each of them: a constant may ask for a gradient here and not there, and reaches no parameter.
            factors = torch.randn(real.shape, generator=generator).to(real)
            if not output.requires_grad:
                continue
            part = (torch.where(real.isfinite(), real, 0) * factors).sum()
            total = part if total is None else total + part
    return total


def _size(tensor: Tensor) -> float:
    values = tensor.detach().to_dense().abs()
    return float(values.double().nan_to_num(torch.inf, torch.inf).max()) if values.numel() else 0.0
