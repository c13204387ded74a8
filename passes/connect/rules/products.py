"""How products pass signals on: with a layer's weight, on either side, with other matrices, and of two activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from growfx.passes.connect.rules.norms import scaled_by
from growfx.passes.connect.run import UnitRun
from growfx.passes.connect.signals import Ints, filled, narrowed, numbers, tidy, varies
from growfx.passes.connect.values import Ids, Named, Pairs, WeightPart, combine, contract, known, reduce
from growfx.passes.operators.einsum import spelled
from growfx.passes.path_products.values import NoPathRuleError

__all__ = ["OPERATORS", "columns_of", "contracted", "features", "feed", "matrix_of", "note_counted"]

Operation = Callable[..., Any]


def columns_of(ids: Tensor, columns: Ints) -> tuple[Ints, Ints]:
    """Which signals stand at which column: unique pairs, nothing left out but nothing; columns along the last axis."""
    if not varies(ids, ids.ndim - 1):
        found = np.unique(numbers(narrowed(ids)))
        found = found[found > 0]
        return np.repeat(columns, len(found)), np.tile(found, len(columns))
    pairs = Pairs(ids, filled(columns, (1,) * (ids.ndim - 1) + columns.shape))
    keys = np.unique((pairs.right << 32) | pairs.left)
    at, found = keys >> 32, keys & 0xFFFFFFFF
    return at[found > 0], found[found > 0]


def feed(run: UnitRun, layer: str, ids: Tensor, columns: Ints) -> bool:
    """Note what feeds a layer's columns along the last axis; whether the layer mixes positions instead of units."""
    at, signals = columns_of(ids, columns)
    run.feeds(layer, at, signals)
    single = len(np.unique(at)) == len(at)
    if single:
        return False
    if not varies(ids, ids.ndim - 1):
        run.mixes_positions(layer)
        return True
    run.couple_columns(at, signals)
    return False


def features(run: UnitRun, layer: str, ids: Tensor, units: Ints, columns: Ints) -> Ids:
    """A layer over the last axis."""
    shape = (*ids.shape[:-1], len(units))
    if feed(run, layer, ids, columns):
        return Ids(ids.narrow(-1, 0, 1).expand(shape))
    return Ids(filled(units, (len(units),)).expand(shape))


def matrix_of(run: UnitRun, part: WeightPart) -> tuple[Ints, Ints] | None:
    """Output unit of every row and input column of every column of a weight moved into (out, in, *taps)."""
    if part.places.ndim < 2 or not part.places.numel():
        return None
    rows, columns = (side.flatten(2) if side.ndim > 2 else side.unsqueeze(2) for side in run.places(part))
    if bool((rows != rows[:, :1, :1]).any() | (columns != columns[:1, :, :1]).any()):
        return None
    return rows[:, 0, 0].numpy(), columns[0, :, 0].numpy()


def _one_matrix(part: WeightPart) -> WeightPart | None:
    """A weight (..., rows, columns) that is one matrix, repeated along the leading axes; None where it is not."""
    if part.places.ndim < 2 or not part.places.numel():
        return None
    matrix = part.places[(0,) * (part.places.ndim - 2)]
    return WeightPart(part.layer, matrix, part.counted) if bool((part.places == matrix).all()) else None


def _as_layer(run: UnitRun, ids: Tensor, part: WeightPart | None) -> Tensor | None:
    """What (..., in) becomes behind a weight (out, in); None where the weight was not left a matrix of its layer."""
    matrix = None if part is None or run.layers[part.layer].groups > 1 else matrix_of(run, part)
    if part is None or matrix is None or ids.shape[-1] != len(matrix[1]):
        return None
    note_counted(run, part, ids)
    return features(run, part.layer, ids, *matrix).tensor


def linear(run: UnitRun, op: Operation, input: Any, weight: Any, bias: Any = None) -> Any:  # noqa: A002
    """`F.linear`, with a layer's weight, or another matrix, on either side."""
    result: Any = None
    if isinstance(input, Ids) and isinstance(weight, WeightPart):
        found = _as_layer(run, input.tensor, weight)
        result = None if found is None else Ids(found)
    elif isinstance(input, Ids) and not isinstance(weight, Ids):
        size = weight.tensor.shape[0] if isinstance(weight, Named) else weight.shape[0]
        result = _constant_matrix(run, op, input, weight, -1, size)
    elif isinstance(input, Ids):
        result = Ids(contracted(run, input.tensor, weight.tensor.mT))
    elif isinstance(input, WeightPart) and isinstance(weight, Ids):
        found = _as_layer(run, weight.tensor, _one_matrix(input))
        result = None if found is None else Ids(tidy(found.mT))
    if result is None:
        return run.unknown(op, (input, weight, bias), {})
    return result if bias is None or known(bias) is None else scaled_by(run, result, [bias], -1)


def note_counted(run: UnitRun, weight: WeightPart, ids: Tensor) -> None:
    """Count what a weight that was transformed as a whole is computed over."""
    if weight.counted:
        run.signals.count(numbers(narrowed(ids)), f"the weight of `{weight.layer}` is transformed as a whole")


def _constant_matrix(run: UnitRun, op: Operation, value: Ids, weight: Any, axis: int, size: int) -> Any:
    """A product with a matrix other than a layer's weight: units may stand beside the contracted axis, not along it."""
    if varies(value.tensor, axis % value.tensor.ndim):
        return run.unknown(op, (value, weight), {})
    shape = list(value.tensor.shape)
    shape[axis] = size
    return Ids(value.tensor.narrow(axis, 0, 1).expand(shape))


def matmul(run: UnitRun, op: Operation, left: Any, right: Any) -> Any:
    """Two activations are contracted; a layer's weight acts as the layer, on whichever side it stands."""
    if isinstance(left, WeightPart) or isinstance(right, WeightPart):
        found = _by_weight(run, left, right)
        return run.unknown(op, (left, right), {}) if found is None else Ids(tidy(found))
    if all(known(item) is not None for item in (left, right)):
        return Ids(contracted(run, known(left), known(right)))  # type: ignore[arg-type]
    weight, value, axis = (right, left, -1) if isinstance(left, Ids) else (left, right, -2)
    tensor = getattr(weight, "tensor", None) if isinstance(weight, Named) else weight
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or value.tensor.ndim < 2:
        return run.unknown(op, (left, right), {})
    return _constant_matrix(run, op, value, weight, axis, tensor.shape[1] if axis == -1 else tensor.shape[0])


def _by_weight(run: UnitRun, left: Any, right: Any) -> Tensor | None:
    """A product with a layer's weight: (..., in) @ (in, out), or (out, in) @ (..., in, n); None where it is neither."""
    part, value = (left, right) if isinstance(left, WeightPart) else (right, left)
    matrix = _one_matrix(part) if isinstance(value, Ids) and value.tensor.ndim else None
    if matrix is None:
        return None
    ids, first = value.tensor, part is left
    if not first:
        matrix = WeightPart(matrix.layer, matrix.places.mT, matrix.counted)
    turned = first and ids.ndim > 1
    result = _as_layer(run, ids.mT if turned else ids, matrix)
    if result is None:
        return None
    if ids.ndim == 1:
        return result.expand(*part.places.shape[:-2], -1)
    result = result.mT if turned else result
    return result.expand(*torch.broadcast_shapes(part.places.shape[:-2], ids.shape[:-2]), -1, -1)


def contracted(run: UnitRun, left: Tensor, right: Tensor) -> Tensor:
    """(..., m, k) times (..., k, n)."""
    if left.ndim == 1 or right.ndim == 1:
        raise NoPathRuleError("a product of activations needs two matrices")
    left, right = left.unsqueeze(-1), right.unsqueeze(-3)
    axes = max(left.ndim, right.ndim)
    left, right = (side.reshape((1,) * (axes - side.ndim) + side.shape) for side in (left, right))
    return contract(run.signals, left, right, (-2,)).select(-2, 0)


def reverse_matmul(run: UnitRun, op: Operation, right: Any, left: Any) -> Any:
    """`__rmatmul__`."""
    return matmul(run, op, left, right)


def add_matmul(run: UnitRun, op: Operation, base: Any, left: Any, right: Any, **kwargs: Any) -> Any:
    """`addmm`, `baddbmm`."""
    run.hold(base, f"its weight is added to a product in {run.place}")
    product = matmul(run, torch.matmul, left, right)
    if known(base) is None or not isinstance(product, Ids):
        return product
    return Ids(combine(run.signals, product.tensor, known(base)))  # type: ignore[arg-type]


def einsum(run: UnitRun, op: Operation, equation: Any, *operands: Any) -> Any:
    """Two activations, or one and a parameter or a layer's weight."""
    items = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    if len(items) == 2 and isinstance(equation, str) and any(isinstance(item, WeightPart) for item in items):
        found = _einsum_by_weight(run, equation, items)
        return run.unknown(op, (equation, *items), {}) if found is None else Ids(tidy(found))
    values = [known(item) for item in items]
    if len(items) != 2 or not isinstance(equation, str) or any(value is None for value in values):
        return run.unknown(op, (equation, *items), {})
    terms, output = spelled(equation, [item.tensor.ndim for item in items])
    if any(len(set(term)) < len(term) for term in terms):
        return run.unknown(op, (equation, *items), {})
    summed = [letter for letter in dict.fromkeys("".join(terms)) if letter not in output]
    order = [*output, *summed]
    sides = []
    for term, tensor in zip(terms, values, strict=True):
        assert tensor is not None
        for letter in [letter for letter in term if letter in summed and not all(letter in other for other in terms)]:
            axis = term.index(letter)
            tensor = reduce(run.signals, tensor, (axis,), None).narrow(axis, 0, 1)
        present = [letter for letter in order if letter in term]
        tensor = tensor.permute([term.index(letter) for letter in present])
        for position, letter in enumerate(order):
            if letter not in term:
                tensor = tensor.unsqueeze(position)
        sides.append(tidy(tensor))
    axes = range(len(output), len(order))
    result = contract(run.signals, sides[0], sides[1], list(axes)) if summed else combine(run.signals, *sides)
    for _ in summed:
        result = result.select(-1, 0)
    return Ids(result)


def _einsum_by_weight(run: UnitRun, equation: str, items: list[Any]) -> Tensor | None:
    """A layer's weight with one free index and one to sum over, and a value; None for all else."""
    which = 0 if isinstance(items[0], WeightPart) else 1
    part, value = items[which], items[1 - which]
    if not isinstance(value, Ids):
        return None
    terms, output = spelled(equation, [part.places.ndim if i == which else value.tensor.ndim for i in range(2)])
    own, other = terms[which], terms[1 - which]
    made = [letter for letter in own if letter not in other]
    summed = [letter for letter in own if letter in other]
    rest = [letter for letter in other if letter not in summed]
    if len(own) != 2 or len(made) != 1 or len(set(other)) < len(other) or sorted(output) != sorted([*rest, *made]):
        return None
    turned = part.places if own[0] == made[0] else part.places.mT
    ids = value.tensor.permute([other.index(letter) for letter in (*rest, *summed)])
    result = _as_layer(run, tidy(ids), WeightPart(part.layer, turned, part.counted))
    return None if result is None else result.permute([[*rest, *made].index(letter) for letter in output])


OPERATORS: dict[str, Callable[..., Any]] = {
    "matmul": matmul,
    "reverse_matmul": reverse_matmul,
    "add_matmul": add_matmul,
    "einsum": einsum,
    "linear": linear,
}
