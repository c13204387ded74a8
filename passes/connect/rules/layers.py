"""How layers pass signals on: each output unit is a new unit, fed by what stands at each input column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from growfx.passes.connect.rules.norms import scaled_by
from growfx.passes.connect.rules.products import columns_of, contracted, features, matrix_of, note_counted
from growfx.passes.connect.run import UnitRun
from growfx.passes.connect.signals import Ints, filled, narrowed, numbers, tidy, varies
from growfx.passes.connect.values import Ids, Named, WeightPart, aligned, combine, known

__all__ = ["MODULES", "OPERATORS"]

Operation = Callable[..., Any]


def linear_module(run: UnitRun, op: Operation, value: Any) -> Any:
    """`Linear`."""
    module = run.module
    units = run.outputs(run.layer, module.out_features, module.in_features)
    return features(run, run.layer, value.tensor, units, np.arange(module.in_features))


def convolution_module(run: UnitRun, op: Operation, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Convolutions, transposed ones, standardised ones."""
    module = run.module
    units = run.outputs(run.layer, module.out_channels, module.in_channels, module.groups)
    if run.applied:
        run.signals.count(numbers(narrowed(value.tensor)), f"the weight of `{run.layer}` is standardised over it")
    shape = run.shapes(op, (value, *args), kwargs)
    return _convolved(run, op, run.layer, value, module, units, shape)


def _convolved(run: UnitRun, op: Operation, layer: str, value: Ids, geometry: Any, units: Ints, shape: Any) -> Any:
    spatial = len(geometry.kernel_size)
    ids = value.tensor.movedim(-spatial - 1, -1)
    at, signals = columns_of(ids, np.arange(ids.shape[-1]))
    if len(np.unique(at)) < len(at) and not varies(ids, ids.ndim - 1):
        return _slid(run, op, layer, value, geometry, shape, (at, signals))
    run.feeds(layer, at, signals)
    run.couple_columns(at, signals)
    channels = filled(units, (len(units), *(1,) * spatial))
    return Ids(channels.expand(shape))


def _slid(run: UnitRun, op: Operation, layer: str, value: Ids, geometry: Any, shape: Any, fed: Any) -> Any:
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


def mixed_convolution(run: UnitRun, op: Operation, value: Any, routing: Any) -> Any:
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


def convolving(run: UnitRun, op: Operation, *args: Any, **kwargs: Any) -> Any:
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
        matrix = None if "transpose" in run.name else matrix_of(run, weight)
        layer = run.layers[weight.layer]
        if matrix is None or groups != layer.groups or len(matrix[0]) != len(layer.units):
            return run.unknown(op, args, kwargs)
        note_counted(run, weight, value.tensor)
        result = _convolved(run, op, weight.layer, value, _Geometry(tuple(tensor.shape[2:])), matrix[0], shape)
        bias = given.get("bias")
        return result if known(bias) is None else scaled_by(run, result, [bias], result.tensor.ndim - spatial - 1)
    if tensor.shape[1] == 1 and groups == tensor.shape[0] and "transpose" not in run.name:  # one filter a channel
        channels = aligned(run.signals, value.tensor, list(range(-spatial, 0)))
        if channels is not None:
            if isinstance(weight, Named) and weight.ids is not None:
                taps = weight.ids.transpose(0, 1)
                combine(run.signals, channels.expand(taps.shape), tidy(taps))
            return Ids(tidy(channels.expand(shape)))
    return run.unknown(op, args, kwargs)


def dot_product_attention(
    run: UnitRun,
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
    return Ids(_attended(run, *parts, repeat=enable_gqa, scaled=scale is None))  # type: ignore[arg-type]


def _attended(
    run: UnitRun, query: Tensor, key: Tensor, value: Tensor, *, repeat: bool = False, scaled: bool = False
) -> Tensor:
    """`repeat`: of keys and values for several queries each. `scaled`: by the number of dims of the queries."""
    if repeat and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = (tidy(side.repeat_interleave(times, -3)) for side in (key, value))
    for part in (query, key, value):
        run.frame(part)
    before = len(run.signals.summed)
    weights = contracted(run, query, tidy(key.mT))
    if scaled:
        run.signals.scaled += run.signals.summed[before:]
    return contracted(run, weights, value)


def multihead_attention(
    run: UnitRun, op: Operation, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
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
        projected = features(run, name, part, units, np.arange(size)).tensor
        if projected.ndim == 3 and not module.batch_first:
            projected = projected.transpose(0, 1)
        heads.append(tidy(projected.unflatten(-1, (module.num_heads, -1)).transpose(-3, -2)))
    joined = _attended(run, *heads).transpose(-3, -2).flatten(-2)
    if joined.ndim == 3 and not module.batch_first:
        joined = joined.transpose(0, 1)
    out = run.layer_name(module.out_proj, f"{run.target}.out_proj")
    units = run.outputs(out, width, width)
    return features(run, out, tidy(joined), units, np.arange(width)), None


MODULES: dict[str, Callable[..., Any]] = {
    "linear": linear_module,
    "convolution": convolution_module,
    "mixed_convolution": mixed_convolution,
    "attention": multihead_attention,
}
OPERATORS: dict[str, Callable[..., Any]] = {
    "convolution": convolving,
    "attention": dot_product_attention,
}
