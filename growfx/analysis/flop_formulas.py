"""Multiply-adds of contractions that torch's flop counter does not know.

Torch counts matrix products, convolutions and attention. What is added here is what weights are applied by elsewhere:
products of a matrix with a vector, bilinear forms, experts, recurrences that one library call computes, and
deformable convolutions. As torch does, a multiply-accumulate is two operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["flop_formulas"]

Shape = Sequence[int]


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas by operator, as `torch.utils.flop_counter.FlopCounterMode(custom_mapping=...)` takes them.

    Operators that are not there in this process, as torchvision's before it is imported, are left out.
    """
    found: dict[Any, Callable[..., int]] = {}
    for library, operators in _FORMULAS.items():
        for name, formula in operators.items():
            try:
                found[getattr(getattr(torch.ops, library), name)] = formula
            except AttributeError:
                continue
    return found


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _vector_product(matrix: Shape, *_: Any, **__: Any) -> int:
    """Of `mv(matrix, vector)` and `dot(vector, vector)`."""
    return 2 * _numel(matrix)


def _added_vector_product(_: Shape, matrix: Shape, *__: Any, **___: Any) -> int:
    return 2 * _numel(matrix)


def _added_batched_product(_: Shape, a: Shape, b: Shape, *__: Any, **___: Any) -> int:
    return 2 * _numel(a) * b[-1]


def _integer_product(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * _numel(a) * b[-1]


def _grouped_product(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """Rows, columns or the inner dimension of one of the operands are spread over the groups."""
    per_group = len(a) == 3 and len(b) == 2
    return 2 * (_numel(a[1:]) if per_group else _numel(a)) * b[-1]


def _trilinear(a: Shape, b: Shape, c: Shape, a_new: Shape, b_new: Shape, c_new: Shape, *_: Any, **__: Any) -> int:
    """A sum over all of what three tensors are broadcast to."""
    return 2 * _numel(torch.broadcast_shapes(_unsqueezed(a, a_new), _unsqueezed(b, b_new), _unsqueezed(c, c_new)))


def _unsqueezed(shape: Shape, dims: Sequence[int]) -> tuple[int, ...]:
    sizes = list(shape)
    for dim in sorted(dims):
        sizes.insert(dim, 1)
    return tuple(sizes)


def _time_convolution(tokens: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * _numel(out_shape) * weight[0] * weight[1]


def _deformable_convolution(image: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * _numel(out_shape) * _numel(weight[1:])


def _recurrent_layer(tokens: Shape, of_inputs: Shape, of_state: Shape, *_: Any, **__: Any) -> int:
    """One layer in one direction, on a CPU: both its matrices at every step of every sequence."""
    return 2 * _numel(tokens[:-1]) * (_numel(of_inputs) + _numel(of_state))


def _recurrent_layers(tokens: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """All layers and directions, on a GPU."""
    return 2 * _numel(tokens[:-1]) * sum(_numel(weight) for weight in weights if len(weight) == 2)


_FORMULAS: dict[str, dict[str, Callable[..., int]]] = {
    "aten": {
        "_cudnn_rnn": _recurrent_layers,
        "_grouped_mm": _grouped_product,
        "_int_mm": _integer_product,
        "_trilinear": _trilinear,
        "addbmm": _added_batched_product,
        "addmv": _added_vector_product,
        "conv_tbc": _time_convolution,
        "dot": _vector_product,
        "mkldnn_rnn_layer": _recurrent_layer,
        "mv": _vector_product,
        "vdot": _vector_product,
    },
    "torchvision": {"deform_conv2d": _deformable_convolution},
}
