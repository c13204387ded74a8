"""Template of a path rule: how path products pass through an operator, here `torch.diff`.

Put the rule into the file of its kind in `passes/path_products/rules/` and its rows into `FUNCTIONS`, `METHODS` or
`MODULES` there; `rules/table.py` collects them. A rule gets the run and the operator's arguments. An argument that
descends from the input is a `PathValue` (float64, no negative element); others are constants, whose magnitudes the run
knows (`run.magnitude(constant)`). Signs do not count, so a difference is the sum of its operands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from growfx.passes.path_products.values import NoPathRuleError, PathValue

if TYPE_CHECKING:
    from growfx.passes.path_products.interpreter import PathGraph

__all__ = ["FUNCTIONS", "METHODS", "difference"]


def difference(
    run: PathGraph,
    input: PathValue,  # noqa: A002 - torch's name
    n: int = 1,
    dim: int = -1,
    prepend: Any = None,
    append: Any = None,
) -> PathValue:
    """Sum of neighbours along `dim`, `n` times; `NoPathRuleError` for what the rule cannot follow."""
    if prepend is not None or append is not None:
        raise NoPathRuleError("`diff` with `prepend` or `append` has no path rule; join with `cat` first")
    tensor = input.tensor
    for _ in range(n):
        size = tensor.shape[dim]
        tensor = tensor.narrow(dim, 1, size - 1) + tensor.narrow(dim, 0, size - 1)
    return PathValue(tensor)


FUNCTIONS: dict[Any, Any] = {torch.diff: difference}
METHODS: dict[str, Any] = {"diff": difference}
