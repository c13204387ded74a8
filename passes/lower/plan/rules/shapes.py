"""Rules of operators that move numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from growfx.passes.lower.plan.builder import (
    Arguments,
    Builder,
    NoKernelError,
    Rule,
    as_number,
    axis_of,
    is_empty,
    numbers,
    view_ops,
)
from growfx.passes.lower.plan.calls import Reference
from growfx.passes.lower.plan.graph import Node, Operand
from growfx.runtime.native.plan import Constant, Shape, Size

__all__ = ["RULES"]


def _reshape(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    return b.reshape(b.operand(a["self"]), shapes[0])


def _same(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    x = b.operand(next(iter(a.values())))
    return b.reshape(x, shapes[0]) if isinstance(x, Node) else x


def _restrided(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    """`as_strided` is a copy in disguise where the sizes are those of the tensor: then its order in memory changes."""
    if b.shape(a["self"]) != shapes[0]:
        raise NoKernelError("to other sizes")
    return b.operand(a["self"])


def _converted(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    if a.get("dtype") == torch.bool:
        return b.truth(a["self"])
    if a.get("dtype") not in (None, torch.float32, torch.float64):
        raise NoKernelError(f"to {a['dtype']}")
    return _same(b, a, shapes)


def _permute(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    rank = b.rank(a["self"])
    return b.permute(b.operand(a["self"]), b.shape(a["self"]), [axis_of(i, rank) for i in a["dims"]])


def _transpose(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    rank = b.rank(a["self"])
    if rank < 2:
        return b.operand(a["self"])
    order = list(range(rank))
    first, second = axis_of(a.get("dim0", 0), rank), axis_of(a.get("dim1", 1), rank)
    order[first], order[second] = second, first
    return b.permute(b.operand(a["self"]), b.shape(a["self"]), order)


def _expand(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    x = b.operand(a["self"])
    ops = view_ops.broadcast(b.shape(a["self"]), shapes[0])
    return b.view(x, ops, shapes[0]) if ops else x


def _slice_start(start: Any, size: Size) -> int:
    if start is None:
        return 0
    if isinstance(start, Size) or size.per_batch:
        if start == 0:
            return 0
        raise NoKernelError("of an axis that grows with the batch")
    return max(start + size.fixed, 0) if start < 0 else start


def _slice(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    shape = b.shape(a["self"])
    axis = axis_of(a["dim"], len(shape))
    if shape == shapes[0] and a["step"] == 1:
        return b.operand(a["self"])
    if a["step"] != 1 and shape[axis].per_batch:
        raise NoKernelError("with a step over an axis that grows with the batch")
    ops = view_ops.slice(axis, _slice_start(a["start"], shape[axis]), a["step"], shapes[0][axis])
    return b.view(b.operand(a["self"]), ops, shapes[0])


def _select(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    shape = b.shape(a["self"])
    axis = axis_of(a["dim"], len(shape))
    ops = view_ops.slice(axis, _slice_start(a["index"], shape[axis]), 1, Size(0, 1)) + view_ops.drop(axis)
    return b.view(b.operand(a["self"]), ops, shapes[0])


def _unbind(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> list[Operand | None]:
    axis = axis_of(a["dim"], b.rank(a["self"]))
    drop = view_ops.drop(axis)
    x = b.operand(a["self"])
    return [b.view(x, view_ops.slice(axis, i, 1, Size(0, 1)) + drop, shape) for i, shape in enumerate(shapes)]


def _split(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> list[Operand | None]:
    axis, at = axis_of(a["dim"], b.rank(a["self"])), 0
    x = b.operand(a["self"])
    parts: list[Operand | None] = []
    for shape in shapes:
        if shape[axis].per_batch:
            raise NoKernelError("of an axis that grows with the batch")
        parts.append(b.view(x, view_ops.slice(axis, at, 1, shape[axis]), shape))
        at += shape[axis].fixed
    return parts


def _cat(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    parts = [b.operand(t) for t in a["tensors"] if not is_empty(b.shape(t))]
    return b.add("concat", parts, shapes[0], [axis_of(a["dim"], len(shapes[0]))])


def _stack(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    axis = axis_of(a["dim"], len(shapes[0]))
    one = (*shapes[0][:axis], Size(0, 1), *shapes[0][axis + 1 :])
    return b.add("concat", [b.reshape(b.node(t), one) for t in a["tensors"]], shapes[0], [axis])


def _flip(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    ops = [n for axis in a["dims"] for n in view_ops.flip(axis_of(axis, len(shapes[0])))]
    return b.view(b.operand(a["self"]), ops, shapes[0])


def _roll(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    x, shape = b.operand(a["self"]), shapes[0]
    if not a["dims"]:
        raise NoKernelError("of all axes as one")
    for shift, dim in zip(a["shifts"], a["dims"], strict=True):
        axis = axis_of(dim, len(shape))
        if shape[axis].per_batch:
            raise NoKernelError("of an axis that grows with the batch")
        size = shape[axis].fixed
        if at := -shift % size:
            parts = [
                b.view(x, view_ops.slice(axis, start, 1, Size(0, n)), (*shape[:axis], Size(0, n), *shape[axis + 1 :]))
                for start, n in ((at, size - at), (0, at))
            ]
            x = b.add("concat", parts, shape, [axis])
    return x


def _repeat(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    """Axis by axis: a new axis before it, repeated, and both made one."""
    x, shape = b.operand(a["self"]), b.shape(a["self"])
    missing = len(shapes[0]) - len(shape)
    shape = (*[Size(0, 1)] * missing, *shape)
    x = b.reshape(x, shape)
    for axis, times in enumerate(a["repeats"]):
        count = times if isinstance(times, Size) else Size(0, times)
        if count == (0, 1):
            continue
        ops = view_ops.insert(axis) + view_ops.expand(axis, count)
        made = b.view(x, ops, (*shape[:axis], count, *shape[axis:]))
        shape = (*shape[:axis], shapes[0][axis], *shape[axis + 1 :])
        x = b.reshape(made, shape)
    return x


def _unfold(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    axis = axis_of(a["dimension"], b.rank(a["self"]))
    return b.view(b.operand(a["self"]), view_ops.unfold(axis, a["size"], a["step"]), shapes[0])


def _pad(mode: int) -> Rule:
    def rule(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
        given = a.get("pad", a.get("padding"))
        widths = numbers(given, 1)
        rank = len(shapes[0])
        if not any(widths):
            return b.operand(a["self"])
        sides = [0] * (2 * rank)
        for i in range(len(widths) // 2):
            axis = rank - 1 - i
            sides[2 * axis], sides[2 * axis + 1] = widths[2 * i], widths[2 * i + 1]
        value = as_number(a.get("value") or 0.0, b.dtype(a["self"]))
        return b.add("pad", [b.operand(a["self"])], shapes[0], [mode, *sides], [value])

    return rule


def _gather(b: Builder, x: Operand, axis: int, index: torch.Tensor, shape: Shape, size: Size) -> Node:
    if size.per_batch:
        raise NoKernelError("along an axis that grows with the batch")
    places = [int(i) % size.fixed for i in index.flatten().tolist()]
    return b.add("gather", [x], shape, [axis, *places])


def _index(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    """Constant indices along neighbouring axes, which become one."""
    x, shape = b.operand(a["self"]), b.shape(a["self"])
    given = {axis: index for axis, index in enumerate(a["indices"]) if index is not None}
    axes = sorted(given)
    if axes != list(range(axes[0], axes[0] + len(axes))):
        raise NoKernelError("with indices along axes that are apart")
    indices = torch.broadcast_tensors(*(b.value(given[axis]) for axis in axes))
    if any(index.dtype == torch.bool for index in indices):
        raise NoKernelError("with a mask")
    sizes = shape[axes[0] : axes[-1] + 1]
    if any(size.per_batch for size in sizes):
        raise NoKernelError("along an axis that grows with the batch")
    flat, total = torch.zeros_like(indices[0]), 1
    for index, size in zip(indices, sizes, strict=True):
        flat = flat * size.fixed + index % size.fixed
        total *= size.fixed
    before, after = shape[: axes[0]], shape[axes[-1] + 1 :]
    merged = b.reshape(x, (*before, Size(0, total), *after))
    taken = (*before, Size(0, flat.numel()), *after)
    return b.reshape(_gather(b, merged, axes[0], flat, taken, Size(0, total)), shapes[0])


def _index_select(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    shape = b.shape(a["self"])
    axis = axis_of(a["dim"], len(shape))
    return _gather(b, b.operand(a["self"]), axis, b.value(a["index"]), shapes[0], shape[axis])


def _pixel_shuffle(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    *lead, channels, height, width = b.shape(a["self"])
    r = a["upscale_factor"]
    split = (*lead, Size(0, channels.fixed // (r * r)), Size(0, r), Size(0, r), height, width)
    n = len(lead)
    turned = b.permute(b.reshape(b.operand(a["self"]), split), split, [*range(n + 1), n + 3, n + 1, n + 4, n + 2])
    return b.reshape(turned, shapes[0])


def _pixel_unshuffle(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    *lead, channels, height, width = b.shape(a["self"])
    r, n = a["downscale_factor"], len(b.shape(a["self"])) - 3
    split = (*lead, channels, Size(0, height.fixed // r), Size(0, r), Size(0, width.fixed // r), Size(0, r))
    turned = b.permute(b.reshape(b.operand(a["self"]), split), split, [*range(n + 1), n + 2, n + 4, n + 1, n + 3])
    return b.reshape(turned, shapes[0])


def _channel_shuffle(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    n, channels, *rest = b.shape(a["self"])
    groups = a["groups"]
    split = (n, Size(0, groups), Size(0, channels.fixed // groups), *rest)
    order = [0, 2, 1, *range(3, len(split))]
    return b.reshape(b.permute(b.reshape(b.operand(a["self"]), split), split, order), shapes[0])


def _filled(b: Builder, a: Arguments, shapes: Sequence[Shape], value: float) -> Node:
    scalar = Constant(torch.full((1,) * len(shapes[0]), float(value)))
    return b.view(scalar, view_ops.broadcast((Size(0, 1),) * len(shapes[0]), shapes[0]), shapes[0])


def _full(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    dtype = a.get("dtype") or (b.dtype(a["self"]) if "self" in a else None)
    return _filled(b, a, shapes, as_number(a["fill_value"], dtype))


def _fill(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    value, dtype = a["value"], b.dtype(a["self"])
    if not isinstance(value, Reference):
        return _filled(b, a, shapes, as_number(value, dtype))
    x = b.converted(value, dtype)
    ops = view_ops.broadcast(b.shape(value), shapes[0])
    return b.view(x, ops, shapes[0]) if ops else x


def _zeros(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    return _filled(b, a, shapes, 0.0)


def _ones(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    return _filled(b, a, shapes, 1.0)


def _slice_scatter(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    """What stands before, the part that is written, what stands behind."""
    shape = shapes[0]
    axis = axis_of(a["dim"], len(shape))
    part = b.shape(a["src"])
    if is_empty(part):
        return b.operand(a["self"])
    if a["step"] != 1 or shape[axis].per_batch or part[axis].per_batch:
        if part == shape:
            return b.operand(a["src"])
        raise NoKernelError("with steps, or along an axis that grows with the batch")
    start, size = _slice_start(a["start"], shape[axis]), part[axis].fixed
    return _replaced(b, b.operand(a["self"]), b.operand(a["src"]), (axis, start, size), shape)


def _select_scatter(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    shape = shapes[0]
    axis = axis_of(a["dim"], len(shape))
    if shape[axis].per_batch:
        raise NoKernelError("along an axis that grows with the batch")
    part = b.reshape(b.operand(a["src"]), (*shape[:axis], Size(0, 1), *shape[axis + 1 :]))
    return _replaced(b, b.operand(a["self"]), part, (axis, _slice_start(a["index"], shape[axis]), 1), shape)


def _replaced(b: Builder, x: Operand, part: Operand, where: tuple[int, int, int], shape: Shape) -> Operand:
    """A tensor in which `part` stands at (axis, start, size)."""
    axis, start, size = where
    parts = list[Operand]()
    for begin, end in ((0, start), (start + size, shape[axis].fixed)):
        if begin == start + size:
            parts.append(part)
        if end > begin:
            sizes = (*shape[:axis], Size(0, end - begin), *shape[axis + 1 :])
            parts.append(b.view(x, view_ops.slice(axis, begin, 1, Size(0, end - begin)), sizes))
    return parts[0] if len(parts) == 1 else b.add("concat", parts, shape, [axis])


def _copied(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    ops = view_ops.broadcast(b.shape(a["src"]), shapes[0])
    x = b.converted(a["src"], b.dtype(a["self"]))
    return b.view(x, ops, shapes[0]) if ops else x


RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(("aten.view", "aten._unsafe_view", "aten.reshape", "aten.squeeze", "aten.unsqueeze"), _reshape),
    **dict.fromkeys(("aten._reshape_alias", "aten.view_copy", "aten.flatten"), _reshape),
    **dict.fromkeys(("aten.clone", "aten.alias", "aten.detach", "aten.lift_fresh", "aten.contiguous"), _same),
    **dict.fromkeys(("aten.as_strided_", "aten.as_strided"), _restrided),
    "aten._to_copy": _converted,
    "aten.cat": _cat,
    "aten.channel_shuffle": _channel_shuffle,
    "aten.native_channel_shuffle": _channel_shuffle,
    "aten.constant_pad_nd": _pad(0),
    "aten.copy": _copied,
    "aten.expand": _expand,
    "aten.fill": _fill,
    "aten.flip": _flip,
    **dict.fromkeys(("aten.full", "aten.new_full", "aten.full_like"), _full),
    "aten.index": _index,
    "aten.index_select": _index_select,
    **dict.fromkeys(("aten.ones", "aten.new_ones", "aten.ones_like"), _ones),
    "aten.permute": _permute,
    "aten.pixel_shuffle": _pixel_shuffle,
    "aten.pixel_unshuffle": _pixel_unshuffle,
    **dict.fromkeys(("aten.reflection_pad1d", "aten.reflection_pad2d", "aten.reflection_pad3d"), _pad(1)),
    **dict.fromkeys(("aten.replication_pad1d", "aten.replication_pad2d", "aten.replication_pad3d"), _pad(2)),
    "aten.repeat": _repeat,
    "aten.roll": _roll,
    "aten.select": _select,
    "aten.select_scatter": _select_scatter,
    "aten.slice": _slice,
    "aten.slice_scatter": _slice_scatter,
    "aten.split": _split,
    "aten.split_with_sizes": _split,
    "aten.stack": _stack,
    "aten.t": _transpose,
    "aten.transpose": _transpose,
    "aten.unbind": _unbind,
    "aten.unfold": _unfold,
    **dict.fromkeys(("aten.zeros", "aten.new_zeros", "aten.zeros_like", "aten.new_empty", "aten.empty_like"), _zeros),
}
