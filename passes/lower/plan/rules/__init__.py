"""How each ATen operator becomes kernels of the native runtime: one table."""

from typing import Final

from growfx.passes.lower.plan.builder import Rule
from growfx.passes.lower.plan.rules import numbers, products, shapes, statistics, windows

__all__ = ["RULES"]

RULES: Final[dict[str, Rule]] = {
    **numbers.RULES,
    **products.RULES,
    **shapes.RULES,
    **statistics.RULES,
    **windows.RULES,
}
