"""What widths a compacted model has, where its own modules state them: measured while both models run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.compaction.apply import sizes_of
from growfx.compaction.widths import stated_widths
from growfx.passes.trials.precision import outputs_of
from growfx.recorded.inputs import Inputs

__all__ = ["find_widths"]


class _Site(NamedTuple):
    """A tensor that goes into a module or comes out of it.

    Attributes:
        module: the module's name.
        into: whether it goes in.
        sizes: of its axes but the first, in the larger model and in the smaller one.
    """

    module: str
    into: bool
    sizes: tuple[tuple[int, int], ...]


def find_widths(before: nn.Module, after: nn.Module, inputs: Inputs) -> dict[tuple[str, str], int]:
    """The widths that modules of a compacted model state and that are not what is there.

    A number describes the module that stands beside it; a name that begins with ``in`` or ``out`` what its own module
    takes or gives. Any other is the width of the last tensor of this size that goes into a part of its module: the
    parts between may have lost other units than what leaves them in the end.

    Args:
        before: the model.
        after: the same with units left out, neither is changed.
        inputs: what both run on, in evaluation mode.

    Returns:
        Module and where in it the number stands (see `stated_widths`) -> what it is now.
    """
    stated = [
        (name, where, number, part)
        for name, module in after.named_modules()
        for where, number, part in stated_widths(module)
        if where not in sizes_of(module)
    ]
    if not stated:
        return {}
    sites = _sites(_shapes(before, inputs), _shapes(after, inputs))
    found: dict[tuple[str, str], int] = {}
    for name, where, number, part in stated:
        new = _measured(sites, name, where, number, part)
        if new is not None and new < number:
            found[name, where] = new
    return found


def _measured(sites: list[_Site], name: str, where: str, number: int, part: str) -> int | None:
    """What became of a width; None where no tensor has it."""
    own = ".".join(filter(None, (name, part)))
    here = [site for site in sites if site.module == own]
    if part:
        return _width([*(s for s in here if not s.into), *(s for s in here if s.into)], number)
    side = where.partition("_")[0]
    if side in ("in", "out") and here:
        return _width([site for site in here if site.into == (side == "in")], number)
    inside = [site for site in reversed(sites) if site.module.startswith(f"{name}." if name else "")]
    parts = [site for site in inside if site.module != name]
    return _width([*(s for s in parts if s.into), *(s for s in parts if not s.into), *here], number)


def _width(sites: list[_Site], number: int) -> int | None:
    """The size that an axis of `number` has now in the first of these that has one."""
    for site in sites:
        now = [small for large, small in site.sizes if large == number]
        if now:
            return min(now)
    return None


def _sites(before: Mapping[Any, tuple[int, ...]], after: Mapping[Any, tuple[int, ...]]) -> list[_Site]:
    """What both models made, in the order in which it was made."""
    return [
        _Site(module, into, tuple(zip(large[1:], after[key][1:], strict=True)))
        for key, large in before.items()
        if len(after.get((module := key[0], into := key[1], *key[2:]), ())) == len(large)
    ]


def _shapes(model: nn.Module, inputs: Inputs) -> dict[tuple[str, bool, int, int], tuple[int, ...]]:
    """Module, whether into it, count of calls, and index among the tensors -> the tensor's shape, in order of time."""
    shapes: dict[tuple[str, bool, int, int], tuple[int, ...]] = {}
    calls: dict[tuple[str, bool], int] = {}

    def note(name: str, into: bool, values: Any) -> None:
        call = calls[name, into] = calls.get((name, into), 0) + 1
        for index, value in enumerate(pytree.tree_leaves(values)):
            if isinstance(value, Tensor):
                shapes[name, into, call, index] = tuple(value.shape)

    with ExitStack() as stack:
        for name, module in model.named_modules():

            def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                note(name, True, (args, kwargs))

            def after(_: nn.Module, args: Any, result: Any, name: str = name) -> None:
                note(name, False, result)

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        outputs_of(model, inputs)
    return shapes
