"""How layers pass signals on: each output unit is a new unit, fed by what stands at each input column."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from growfx.passes.connect_signals import Ints, filled, narrowed, numbers, tidy, varies
from growfx.passes.connect_values import Ids, Named, Pairs, WeightPart, aligned, combine, contract, known, reduce
from growfx.passes.path_values import NoPathRuleError

if TYPE_CHECKING:
    from growfx.passes.connect import UnitGraph

__all__ = ["MODULES", "OPERATORS"]

Operation = Callable[..., Any]


def _columns(ids: Tensor, columns: Ints) -> tuple[Ints, Ints]:
    """Which signals stand at which column: unique pairs, nothing left out but nothing; columns along the last axis."""
    if not varies(ids, ids.ndim - 1):
        found = np.unique(numbers(narrowed(ids)))
        found = found[found > 0]
        return np.repeat(columns, len(found)), np.tile(found, len(columns))
    pairs = Pairs(ids, filled(columns, (1,) * (ids.ndim - 1) + columns.shape))
    keys = np.unique((pairs.right << 32) | pairs.left)
    at, found = keys >> 32, keys & 0xFFFFFFFF
    return at[found > 0], found[found > 0]


def feed(run: UnitGraph, layer: str, ids: Tensor, columns: Ints) -> bool:
    """Note what feeds a layer's columns along the last axis; whether the layer mixes positions instead of units."""
    at, signals = _columns(ids, columns)
    run.feeds(layer, at, signals)
    single = len(np.unique(at)) == len(at)
    if single:
        return False
    if not varies(ids, ids.ndim - 1):
        run.mixes_positions(layer)
        return True
    run.couple_columns(at, signals)
    return False


def _features(run: UnitGraph, layer: str, ids: Tensor, units: Ints, columns: Ints) -> Ids:
    """A layer over the last axis."""
    shape = (*ids.shape[:-1], len(units))
    if feed(run, layer, ids, columns):
        return Ids(ids.narrow(-1, 0, 1).expand(shape))
    return Ids(filled(units, (len(units),)).expand(shape))


def linear_module(run: UnitGraph, op: Operation, value: Any) -> Any:
    """`Linear`."""
    module = run.module
    units = run.outputs(run.layer, module.out_features, module.in_features)
    return _features(run, run.layer, value.tensor, units, np.arange(module.in_features))


def _matrix(run: UnitGraph, part: WeightPart) -> tuple[Ints, Ints] | None:
    """Output unit of every row and input column of every column of a weight moved into (out, in)."""
    rows, columns = run.places(part)
    rows, columns = (
        rows.flatten(2)[..., 0] if rows.ndim > 2 else rows,
        columns.flatten(2)[..., 0] if rows.ndim > 2 else columns,
    )
    if rows.ndim != 2 or bool((rows != rows[:, :1]).any() | (columns != columns[:1]).any()):
        return None
    return rows[:, 0].numpy(), columns[0].numpy()


def linear(run: UnitGraph, op: Operation, input: Any, weight: Any, bias: Any = None) -> Any:  # noqa: A002
    """`F.linear`, with a layer's weight or another matrix."""
    if isinstance(weight, WeightPart):
        matrix = _matrix(run, weight)
        if isinstance(input, Ids) and matrix is not None:
            _note_counted(run, weight, input.tensor)
            return _features(run, weight.layer, input.tensor, *matrix)
        return run.unknown(op, (input, weight), {})
    if isinstance(input, Ids) and not isinstance(weight, Ids):
        return _constant_matrix(
            run, op, input, weight, -1, weight.tensor.shape[0] if isinstance(weight, Named) else weight.shape[0]
        )
    if isinstance(input, Ids):
        return Ids(_matmul(run, input.tensor, weight.tensor.mT))
    return run.unknown(op, (input, weight), {})


def _note_counted(run: UnitGraph, weight: WeightPart, ids: Tensor) -> None:
    if weight.counted:
        run.signals.count(numbers(narrowed(ids)), f"the weight of `{weight.layer}` is transformed as a whole")


def _constant_matrix(run: UnitGraph, op: Operation, value: Ids, weight: Any, axis: int, size: int) -> Any:
    """A product with a matrix that is no layer's weight: units may stand beside the contracted axis, not along it."""
    if varies(value.tensor, axis % value.tensor.ndim):
        return run.unknown(op, (value, weight), {})
    shape = list(value.tensor.shape)
    shape[axis] = size
    return Ids(value.tensor.narrow(axis, 0, 1).expand(shape))


def matmul(run: UnitGraph, op: Operation, left: Any, right: Any) -> Any:
    """Two activations are contracted; a layer's weight acts as the layer."""
    if isinstance(left, Ids) and isinstance(right, Ids):
        return Ids(_matmul(run, left.tensor, right.tensor))
    if isinstance(left, Ids) and isinstance(right, WeightPart):
        turned = WeightPart(right.layer, right.places.mT, right.counted) if right.places.ndim == 2 else right
        return linear(run, op, left, turned)
    if all(known(item) is not None for item in (left, right)):
        return Ids(_matmul(run, known(left), known(right)))  # type: ignore[arg-type]
    weight, value, axis = (right, left, -1) if isinstance(left, Ids) else (left, right, -2)
    tensor = getattr(weight, "tensor", None) if isinstance(weight, Named) else weight
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or value.tensor.ndim < 2:
        return run.unknown(op, (left, right), {})
    return _constant_matrix(run, op, value, weight, axis, tensor.shape[1] if axis == -1 else tensor.shape[0])


def _matmul(run: UnitGraph, left: Tensor, right: Tensor) -> Tensor:
    """(..., m, k) times (..., k, n)."""
    if left.ndim == 1 or right.ndim == 1:
        raise NoPathRuleError("a product of activations needs two matrices")
    left, right = left.unsqueeze(-1), right.unsqueeze(-3)
    axes = max(left.ndim, right.ndim)
    left, right = (side.reshape((1,) * (axes - side.ndim) + side.shape) for side in (left, right))
    return contract(run.signals, left, right, (-2,)).select(-2, 0)


def reverse_matmul(run: UnitGraph, op: Operation, right: Any, left: Any) -> Any:
    """`__rmatmul__`."""
    return matmul(run, op, left, right)


def add_matmul(run: UnitGraph, op: Operation, base: Any, left: Any, right: Any, **kwargs: Any) -> Any:
    """`addmm`, `baddbmm`."""
    product = matmul(run, torch.matmul, left, right)
    if known(base) is None or not isinstance(product, Ids):
        return product
    return Ids(combine(run.signals, product.tensor, known(base)))  # type: ignore[arg-type]


def einsum(run: UnitGraph, op: Operation, equation: Any, *operands: Any) -> Any:
    """Two activations, or one and a parameter."""
    items = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    values = [known(item) for item in items]
    if len(items) != 2 or not isinstance(equation, str) or any(value is None for value in values):
        return run.unknown(op, (equation, *items), {})
    terms, output = _letters(equation, [item.tensor.ndim for item in items])
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


def _letters(equation: str, dims: list[int]) -> tuple[list[str], str]:
    """Index letters of both operands and of the result, ellipses written out."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    spare = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in equation]
    hidden = [dim - len(term.replace("...", "")) if "..." in term else 0 for term, dim in zip(terms, dims, strict=True)]
    longest = max(hidden)
    written = ["".join(spare[longest - count : longest]) for count in hidden]
    terms = [term.replace("...", letters) for term, letters in zip(terms, written, strict=True)]
    if not arrow:
        once = sorted(letter for letter in set("".join(terms)) if "".join(terms).count(letter) == 1)
        output = "".join(once)
    return terms, output.replace("...", "".join(spare[:longest]))


def convolution_module(run: UnitGraph, op: Operation, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Convolutions, transposed ones, standardised ones."""
    module = run.module
    units = run.outputs(run.layer, module.out_channels, module.in_channels, module.groups)
    if run.applied:
        run.signals.count(numbers(narrowed(value.tensor)), f"the weight of `{run.layer}` is standardised over it")
    shape = run.shapes(op, (value, *args), kwargs)
    return _convolved(run, op, run.layer, value, module, units, shape)


def _convolved(run: UnitGraph, op: Operation, layer: str, value: Ids, geometry: Any, units: Ints, shape: Any) -> Any:
    spatial = len(geometry.kernel_size)
    ids = value.tensor.movedim(-spatial - 1, -1)
    at, signals = _columns(ids, np.arange(ids.shape[-1]))
    if len(np.unique(at)) < len(at) and not varies(ids, ids.ndim - 1):
        return _slid(run, op, layer, value, geometry, shape, (at, signals))
    run.feeds(layer, at, signals)
    run.couple_columns(at, signals)
    channels = filled(units, (len(units), *(1,) * spatial))
    return Ids(channels.expand(shape))


def _slid(run: UnitGraph, op: Operation, layer: str, value: Ids, geometry: Any, shape: Any, fed: Any) -> Any:
    """A convolution whose channels are positions, as units stand along the axes that it slides over."""
    run.feeds(layer, *fed)
    run.mixes_positions(layer)
    spatial = len(geometry.kernel_size)
    sliding = any(
        varies(value.tensor, axis) and int(size) > 1
        for axis, size in zip(range(value.tensor.ndim - spatial, value.tensor.ndim), geometry.kernel_size, strict=True)
    )
    line = value.tensor.narrow(-spatial - 1, 0, 1)
    fits = all(line.shape[axis] == shape[axis] or not varies(line, axis) for axis in range(-spatial, 0))
    if not sliding and fits:
        for axis in range(line.ndim):
            line = line if varies(line, axis) else line.narrow(axis, 0, 1)
        return Ids(tidy(line.expand(shape)))
    run.signals.pin(numbers(narrowed(value.tensor)), f"`{layer}` slides over it")
    mixed = filled(np.array([run.signals.mixed(numbers(narrowed(value.tensor)))]), (1,)).expand(shape)
    if not fits or (sliding and any(line.shape[axis] != shape[axis] for axis in range(-spatial, 0))):
        return Ids(mixed)
    first = numbers(line.expand(shape).contiguous())
    return Ids(tidy(filled(run.signals.lead(first, numbers(mixed.contiguous())), shape)))


def mixed_convolution(run: UnitGraph, op: Operation, value: Any, routing: Any) -> Any:
    """A convolution whose kernel is a sum over experts, weighted by data."""
    module = run.module
    units = run.outputs(run.layer, module.out_channels, module.in_channels, module.groups)
    shape = run.shapes(op, (value, routing), {})
    result = _convolved(run, op, run.layer, value, module, units, shape)
    if isinstance(routing, Ids):
        run.signals.pin(numbers(narrowed(routing.tensor)), f"it weighs the experts of `{run.layer}`")
        mix = filled(np.array([run.signals.mixed(numbers(narrowed(routing.tensor)))]), (1,))
        return Ids(combine(run.signals, result.tensor, mix))
    return result


class _Geometry:
    def __init__(self, kernel: tuple[int, ...]) -> None:
        self.kernel_size = kernel


def convolving(run: UnitGraph, op: Operation, *args: Any, **kwargs: Any) -> Any:
    """Convolutions as functions: with a layer's weight, or one filter for all channels alike."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    value, weight = given["input"], given["weight"]
    if not isinstance(value, Ids) or isinstance(weight, Ids):
        return run.unknown(op, args, kwargs)
    tensor = weight.places if isinstance(weight, WeightPart) else getattr(weight, "tensor", weight)
    spatial = tensor.ndim - 2
    shape = run.shapes(op, args, kwargs)
    groups = value.tensor.shape[-spatial - 1] // tensor.shape[1]
    if isinstance(weight, WeightPart):
        matrix = None if "transpose" in run.name else _matrix(run, weight)
        layer = run.layers[weight.layer]
        if matrix is None or groups != layer.groups or len(matrix[0]) != len(layer.units):
            return run.unknown(op, args, kwargs)
        _note_counted(run, weight, value.tensor)
        return _convolved(run, op, weight.layer, value, _Geometry(tuple(tensor.shape[2:])), matrix[0], shape)
    if tensor.shape[1] == 1 and groups == tensor.shape[0] and "transpose" not in run.name:  # one filter a channel
        channels = aligned(run.signals, value.tensor, list(range(-spatial, 0)))
        if channels is not None:
            if isinstance(weight, Named) and weight.ids is not None:
                taps = weight.ids.transpose(0, 1)
                combine(run.signals, channels.expand(taps.shape), tidy(taps))
            return Ids(tidy(channels.expand(shape)))
    return run.unknown(op, args, kwargs)


def dot_product_attention(
    run: UnitGraph,
    op: Operation,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Any:
    """The two products of attention; query and key dims are coupled, the result has the units of the values."""
    parts = [known(item) for item in (query, key, value)]
    if any(part is None for part in parts):
        return run.unknown(op, (query, key, value), {})
    return Ids(_attended(run, *parts, enable_gqa))  # type: ignore[arg-type]


def _attended(run: UnitGraph, query: Tensor, key: Tensor, value: Tensor, repeat: bool = False) -> Tensor:
    if repeat and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = (tidy(side.repeat_interleave(times, -3)) for side in (key, value))
    for part in (query, key, value):
        run.frame(part)
    return _matmul(run, _matmul(run, query, tidy(key.mT)), value)


def multihead_attention(
    run: UnitGraph, op: Operation, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> Any:
    """In-projections (rows: queries, keys, values), attention, out-projection."""
    module, layer = run.module, run.layer
    parts = [known(item) for item in (query, key, value)]
    if any(part is None for part in parts) or module.bias_k is not None or module.add_zero_attn:
        return run.unknown(op, (query, key, value), {})
    width = module.embed_dim
    if module.in_proj_weight is None:
        names = [f"{layer}.{name}_proj_weight" for name in "qkv"]
        sizes = [width, module.kdim, module.vdim]
        rows = [run.outputs(name, width, size) for name, size in zip(names, sizes, strict=True)]
    else:
        names, sizes = [layer] * 3, [width] * 3
        rows = list(run.outputs(layer, 3 * width, width).reshape(3, width))
    heads = []
    for part, name, units, size in zip(parts, names, rows, sizes, strict=True):
        assert part is not None
        projected = _features(run, name, part, units, np.arange(size)).tensor
        if projected.ndim == 3 and not module.batch_first:
            projected = projected.transpose(0, 1)
        heads.append(tidy(projected.unflatten(-1, (module.num_heads, -1)).transpose(-3, -2)))
    joined = _attended(run, *heads).transpose(-3, -2).flatten(-2)
    if joined.ndim == 3 and not module.batch_first:
        joined = joined.transpose(0, 1)
    out = run.layer_name(module.out_proj, f"{run.target}.out_proj")
    units = run.outputs(out, width, width)
    return _features(run, out, tidy(joined), units, np.arange(width)), None


MODULES: dict[str, Callable[..., Any]] = {
    "linear": linear_module,
    **dict.fromkeys(("convolution", "same_convolution", "transposed_convolution"), convolution_module),
    "mixed_convolution": mixed_convolution,
    "multihead_attention": multihead_attention,
}
OPERATORS: dict[str, Callable[..., Any]] = {
    "matmul": matmul,
    "reverse_matmul": reverse_matmul,
    "add_matmul": add_matmul,
    "einsum": einsum,
    "linear": linear,
    "convolving": convolving,
    "dot_product_attention": dot_product_attention,
}
