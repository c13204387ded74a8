"""How operators pass signals on: elementwise operations, data movement, statistics, normalization.

A rule is found by the family of the operator's path rule, so that an operator is in one table only; what has no row
here is not understood, and pins what it touches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from growfx.passes.connect.run import UnitRun
from growfx.passes.connect.signals import narrowed, numbers, tidy, varies
from growfx.passes.connect.values import Ids, Named, Unknown, aligned, combine, known, moved, raw_ids, real, reduce

__all__ = ["INDEXED", "MODULES", "OPERATORS", "pairwise", "spatial"]

Operation = Callable[..., Any]


def pairwise(run: UnitRun, op: Operation, left: Any, right: Any, *args: Any, **kwargs: Any) -> Any:
    """Elementwise operations of two values: what stands at one place is coupled."""
    first, second = known(left), known(right)
    if first is not None and second is not None:
        return Ids(combine(run.signals, first, second))
    ids = first if first is not None else second
    assert ids is not None
    other = right if first is not None else left
    other = other.tensor if isinstance(other, Named) else other
    if not isinstance(other, Tensor):
        return Ids(ids)
    fixed(run, ids, other, "combined")
    return Ids(ids.expand(torch.broadcast_shapes(ids.shape, other.shape)))


def fixed(run: UnitRun, ids: Tensor, constant: Tensor, what: str, but: int | None = None) -> None:
    """Pin units beside a constant that has an element for each of them: it could not be cut."""
    shape = (1,) * (ids.ndim - constant.ndim) + tuple(constant.shape)
    for axis, size in enumerate(shape[-ids.ndim :]):
        if size > 1 and axis != but and varies(ids, axis) and aligned(run.signals, ids, (axis,)) is None:
            run.signals.pin(numbers(narrowed(ids)), f"{what} with a computed constant in {run.place}")
            return


def addcmul(run: UnitRun, op: Operation, base: Any, left: Any, right: Any, **kwargs: Any) -> Any:
    """base + left * right."""
    product = pairwise(run, op, left, right) if any(known(item) is not None for item in (left, right)) else left
    return pairwise(run, op, base, product)


def gated(run: UnitRun, op: Operation, value: Any, dim: int = -1) -> Any:
    """Gated linear unit: first and second half stand at one place."""
    first, second = value.tensor.chunk(2, dim)
    return Ids(combine(run.signals, tidy(first), tidy(second)))


def clamp(run: UnitRun, op: Operation, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Clamping; limits may be values themselves."""
    for limit in (*args, *kwargs.values()):
        if isinstance(limit, (Ids, Named, Tensor)):
            value = pairwise(run, op, value, limit)
    return value


def moving(run: UnitRun, op: Operation, *args: Any, **kwargs: Any) -> Any:
    """Data movement: executed on the signals."""
    return moved(op(*raw_ids(args), **raw_ids(kwargs)))


def joining(run: UnitRun, op: Operation, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """`cat`, `stack`: executed. Axes that are not joined have one size in all operands: units there are coupled."""
    dim = kwargs.get("dim", args[0] if args else 0)
    new = run.name not in ("cat", "concat", "concatenate")
    operands = [known(item) for item in tensors]
    found = [ids for ids in operands if ids is not None]
    dtype = torch.float64
    for item, ids in zip(tensors, operands, strict=True):
        if ids is None and isinstance(real(item), Tensor) and real(item).ndim == found[0].ndim:
            for other in found:
                if new or real(item).numel():
                    fixed(run, other, real(item), "joined", None if new else dim % other.ndim)
    plain = [
        torch.zeros(real(item).shape, dtype=dtype, device="cpu") if ids is None else ids
        for item, ids in zip(tensors, operands, strict=True)
    ]
    if run.name in ("cat", "concat", "concatenate", "stack"):
        _beside(run, plain, dim, new)
    return moved(op(plain, *args, **kwargs))


def _beside(run: UnitRun, operands: list[Tensor], dim: int, new: bool) -> None:
    """Couple what stands at the same place beside the joined axis."""
    signals = run.signals
    lead: Tensor | None = None
    for ids in operands:
        if ids.numel() == 0:
            continue
        line = ids if new else aligned(signals, ids, (dim,))
        if line is None or not line.any() or not any(varies(tidy(line), axis) for axis in range(line.ndim)):
            continue
        line = tidy(line)
        if lead is None:
            lead = line
            continue
        combine(signals, lead, line)


def padding(run: UnitRun, op: Operation, input: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:  # noqa: A002
    """Padding with zeros writes nothing; other modes repeat."""
    return moved(torch.nn.functional.pad(input.tensor, real(pad), mode=mode))


def zero_pad(run: UnitRun, op: Operation, value: Any) -> Any:
    """Constant padding writes nothing, whatever its value."""
    return moved(torch.nn.functional.pad(value.tensor, run.module.padding))


def attribute(run: UnitRun, op: Operation, value: Any, name: str, *default: Any) -> Any:
    """`getattr`: transposed views are moved, the rest are facts."""
    if name in ("T", "mT", "H", "mH"):
        return moved(getattr(value.tensor, name))
    return run.model_dtype if name == "dtype" else getattr(value.tensor, name)


def fact(run: UnitRun, op: Operation, *args: Any, **kwargs: Any) -> Any:
    """Sizes and the like are facts; comparisons and other judgements say nothing of units."""
    if run.name in _FACTS:
        return op(*real(args), **real(kwargs))
    if run.name in ("_assert", "is_grad_enabled"):
        return True
    return run.judged(op, args, kwargs)


_FACTS = frozenset(
    {
        *("size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset", "element_size", "get_device"),
        *("is_floating_point", "is_complex", "is_contiguous", "__len__", "len", "isinstance", "type", "is_tensor"),
        *("is_", "is_not"),
    }
)


def get_item(run: UnitRun, op: Operation, value: Any, index: Any) -> Any:
    """An element of a tuple or dict, or a part of a tensor."""
    if isinstance(value, Ids):
        return moved(value.tensor[real(index)])
    return value[real(index)]


def write_item(run: UnitRun, op: Operation, base: Any, index: Any, value: Any) -> Any:
    """`base[index] = value` in functional form."""
    if isinstance(base, dict):
        return {**base, index: value}
    target = known(base)
    target = torch.zeros(real(base).shape, dtype=torch.float64, device="cpu") if target is None else target.clone()
    written = known(value)
    if written is None:
        written = torch.zeros((), dtype=torch.float64, device="cpu")
    target[real(index)] = written
    return Ids(tidy(target))


def fill(run: UnitRun, op: Operation, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
    """`masked_fill`: what is not filled stays."""
    if isinstance(mask, Ids):
        return pairwise(run, op, value, mask)
    if isinstance(mask, Unknown):
        return value
    fixed(run, value.tensor, mask if isinstance(mask, Tensor) else mask.tensor, "filled")
    return Ids(value.tensor.expand(torch.broadcast_shapes(value.tensor.shape, real(mask).shape)))


def where(run: UnitRun, op: Operation, condition: Any, left: Any = None, right: Any = None, **kwargs: Any) -> Any:
    """Selection: either may pass, so both are coupled."""
    sides = [kwargs.get("input", left), kwargs.get("other", right), condition]
    value: Any = None
    for side in sides:
        if isinstance(side, (Ids, Named, Tensor)):
            both_plain = value is not None and known(value) is None and known(side) is None
            value = side if value is None or both_plain else pairwise(run, op, value, side)
    return value


def method_where(run: UnitRun, op: Operation, value: Any, condition: Any, other: Any) -> Any:
    """`value.where(condition, other)`."""
    return where(run, op, condition, value, other)


def new_tensor_like(run: UnitRun, op: Operation, *args: Any, **kwargs: Any) -> Any:
    """`zeros_like`, `new_ones`: constants."""
    return op(*real(args), **real(kwargs)).to(run.model_dtype)


def zeroed(run: UnitRun, op: Operation, value: Any) -> Any:
    """`zero_`: a constant from here on."""
    return torch.zeros(value.tensor.shape, dtype=run.model_dtype, device="cpu")


def copied(run: UnitRun, op: Operation, base: Any, source: Any, *args: Any) -> Any:
    """`copy_` onto a whole tensor: the source."""
    shape, ids = real(base).shape, known(source)
    return real(source).expand(shape) if ids is None else Ids(ids.expand(shape))


def _axes(tensor: Tensor, dim: Any) -> list[int]:
    if dim is None or dim in ((), []):
        return list(range(tensor.ndim))
    return [axis % tensor.ndim for axis in ([dim] if isinstance(dim, int) else dim)]


def mean(run: UnitRun, op: Operation, value: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """A statistic over dims; units along them are counted by it."""
    axes = _axes(value.tensor, kwargs.pop("axis", dim))
    reason = None if run.name in ("sum", "nansum") else f"a {run.name} over it in {run.place}"
    result = reduce(run.signals, value.tensor, axes, reason)
    if not keepdim:
        for axis in sorted(axes, reverse=True):
            result = result.select(axis, 0)
    return Ids(result)


def spread(run: UnitRun, op: Operation, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Variance and standard deviation."""
    dim = kwargs.get("dim", next((item for item in args if not isinstance(item, bool)), None))
    return mean(run, op, value, dim, kwargs.get("keepdim", len(args) > 2 and args[2]))


def spread_and_mean(run: UnitRun, op: Operation, value: Any, *args: Any, **kwargs: Any) -> Any:
    """`var_mean`."""
    result = spread(run, op, value, *args, **kwargs)
    return result, result


def norm(run: UnitRun, op: Operation, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Norms."""
    dim, keepdim = (
        kwargs.get("dim", args[1] if len(args) > 1 else None),
        kwargs.get("keepdim", len(args) > 2 and args[2]),
    )
    return mean(run, op, value, dim, keepdim)


def extreme(run: UnitRun, op: Operation, value: Any, dim: Any = None, keepdim: bool = False, other: Any = None) -> Any:
    """`max`, `min` of a tensor, over a dim, or of two tensors."""
    other = dim if isinstance(dim, (Tensor, Ids, Named)) else other
    if other is not None:
        return pairwise(run, op, value, other)
    if dim is None:
        return mean(run, op, value)
    result = mean(run, op, value, dim, keepdim)
    return result, run.judged(op, (value, dim, keepdim), {})[1]


def summed(run: UnitRun, op: Operation, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Sums over dims; running sums where no units stand along them; overlapping blocks."""
    if run.name in ("sum", "nansum"):
        kwargs.pop("dtype", None)
        return mean(run, op, value, *args, **kwargs)
    if run.name == "cumsum":
        dim = kwargs.get("dim", args[0] if args else -1)
        return (
            value if aligned(run.signals, value.tensor, (dim,)) is not None else run.unknown(op, (value, *args), kwargs)
        )
    return folding(run, op, value, *args, **kwargs)


def folding(run: UnitRun, op: Operation, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Blocks (..., channels * places, blocks) added into an image: channels stay when all places carry the same."""
    shape = run.shapes(op, (value, *args), kwargs)
    channels = shape[-3]
    blocks = value.tensor.unflatten(-2, (channels, -1))
    image = aligned(run.signals, tidy(blocks), (-2, -1))
    if image is None:
        return run.unknown(op, (value, *args), kwargs)
    return Ids(tidy(image.expand(shape)))


def spatial(run: UnitRun, op: Operation, *args: Any, **kwargs: Any) -> Any:
    """Pooling and resampling of the trailing axes: units stay where each channel is one unit."""
    value = kwargs["input"] if "input" in kwargs and not args else args[0]
    shape = run.shapes(op, args, kwargs)
    if not isinstance(shape, torch.Size) or not isinstance(value, Ids) or len(shape) != value.tensor.ndim:
        return run.unknown(op, args, kwargs)
    axes = list(range(2 if len(shape) > 2 else 1, len(shape)))
    if len(shape) == 3 and "2d" in run.name.lower():
        axes = [1, 2]
    channels = aligned(run.signals, value.tensor, axes)
    if channels is None:
        return run.unknown(op, args, kwargs)
    return Ids(tidy(channels.expand(shape)))


def gated_module(run: UnitRun, op: Operation, value: Any) -> Any:
    """`GLU`."""
    return gated(run, op, value, run.module.dim)


def executed(run: UnitRun, op: Operation, value: Any) -> Any:
    """Modules that only move elements."""
    return moved(type(run.module).forward(run.module, value.tensor))


OPERATORS: dict[str, Callable[..., Any]] = {
    "pairwise": pairwise,
    "addcmul": addcmul,
    "gated": gated,
    "clamp": clamp,
    "moving": moving,
    "joining": joining,
    "padding": padding,
    "attribute": attribute,
    "summed": summed,
    "judging": fact,
    "get_item": get_item,
    "write_item": write_item,
    "fill": fill,
    "where": where,
    "method_where": method_where,
    "like": new_tensor_like,
    "zero_in_place": zeroed,
    "copy_in_place": copied,
    "mean": mean,
    "spread": spread,
    "spread_and_mean": spread_and_mean,
    "norm": norm,
    "extreme": extreme,
    "spatial": spatial,
}

# Rules that use constants as indices.
INDEXED = (moving, get_item, write_item)

MODULES: dict[str, Callable[..., Any]] = {
    "gated": gated_module,
    "executed": executed,
    "folding": folding,
    "zero_pad": zero_pad,
    "spatial": spatial,
}
