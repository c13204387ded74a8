"""Path rules of writes to named places, in functional form and in place: executed, constants counting as zeros.

At places chosen by data, what is written is spread evenly over all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from growfx.passes.path_products.rules.shape import zeros_for_constants
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import ComparedValue, Ended, NoPathRuleError, PathValue, paths_in, raw

__all__ = ["FUNCTIONS", "METHODS", "SEES_ENDS"]


def _operands(run: PathRun, *items: Any) -> list[Any]:
    """Tensors of a base and of what is written into it, zeros for constants and numbers."""
    tensors = zeros_for_constants(run, list(items))
    return [0.0 if isinstance(item, (int, float)) else item for item in tensors]


def _bounded(*items: Any) -> bool:
    return all(item.bounded for item in items if isinstance(item, PathValue))


def writing(function: Callable[..., Tensor], adds: bool) -> Callable[..., Any]:
    """The rule of a write of `source` along a dim at `index`; `adds` where it is added to what is there."""

    def rule(
        run: PathRun,
        base: Any,
        dim: int,
        index: Any,
        source: Any = 0,
        reduce: str = "sum",
        src: Any = None,
        value: Any = None,
        **kwargs: Any,
    ) -> Any:
        source = next((item for item in (src, value) if item is not None), source)
        if isinstance(index, PathValue):
            raise NoPathRuleError("writing to places that are activations has no path rule")
        whole, written = _operands(run, base, source)
        if isinstance(index, (ComparedValue, Ended)):
            if not isinstance(written, Tensor):
                return PathValue(whole)
            return PathValue(whole + written.sum() / max(whole.numel(), 1))
        options = {name: item for name, item in raw(kwargs).items() if name == "include_self"}
        if function is Tensor.scatter_reduce:
            options["reduce"] = "sum" if reduce == "sum" else "mean"  # a product and an extreme count as their mean
        if adds and "alpha" in kwargs:
            written = written * abs(float(kwargs["alpha"]))
        return PathValue(function(whole, dim, raw(index), written, **options), _bounded(base, source) and not adds)

    return rule


def put(run: PathRun, base: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    """`index_put`: at a tuple of index tensors."""
    whole, written = _operands(run, base, values)
    if any(isinstance(item, (ComparedValue, Ended)) for item in indices):
        return PathValue(whole + written.sum() / max(whole.numel(), 1))
    return PathValue(torch.index_put(whole, raw(tuple(indices)), written, accumulate), _bounded(base, values))


def part_written(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """The rule of `select_scatter`, `slice_scatter`, `diagonal_scatter`."""

    def rule(run: PathRun, base: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        whole, written = _operands(run, base, source)
        return PathValue(function(whole, written, *raw(args), **raw(kwargs)), _bounded(base, source))

    return rule


def padded_sequence(
    run: PathRun, sequences: Any, batch_first: bool = False, padding_value: float = 0.0, padding_side: str = "right"
) -> Any:
    """Sequences of different lengths in one tensor: padding carries no path."""
    tensors = zeros_for_constants(run, list(sequences))
    return PathValue(pad_sequence(tensors, batch_first, 0.0, padding_side), _bounded(*paths_in(sequences)))


_C: Any = torch._C  # its submodules are not known to type checkers
_WRITES: dict[str, bool] = {
    "index_add": True, "scatter_add": True, "index_copy": False, "scatter": False, "scatter_reduce": False,
    "index_fill": False,
}  # fmt: skip
_RULES = {name: writing(getattr(Tensor, name), adds) for name, adds in _WRITES.items()}
_PARTS = {name: part_written(getattr(torch, name)) for name in ("select_scatter", "slice_scatter", "diagonal_scatter")}

FUNCTIONS: dict[Any, Any] = {
    **{getattr(torch, name): rule for name, rule in (_RULES | _PARTS).items()},
    **dict.fromkeys((torch.index_put, torch.index_put_), put),
    **dict.fromkeys((pad_sequence, _C._nn.pad_sequence), padded_sequence),
}

METHODS: dict[str, Any] = {
    **_RULES,
    **{f"{name}_": rule for name, rule in _RULES.items()},
    **_PARTS,
    **dict.fromkeys(["index_put", "index_put_"], put),
}

SEES_ENDS: frozenset[Callable[..., Any]] = frozenset({*_RULES.values(), put})
