"""How many things a budget buys, where they come in a fixed order and have different prices."""

from collections.abc import Callable

__all__ = ["largest_within"]


def largest_within(cost_of: Callable[[int], float], budget: float, most: int) -> int:
    """Return the largest count from 0 to `most` whose cost is within `budget`, by bisection.

    `cost_of`: of the first so many, not falling with the count; it is called about ``log2(most)`` times. A count of 0
    is never asked for: it costs nothing more.
    """
    if most <= 0:
        return 0
    low, high = 0, most + 1  # `low` is affordable, `high` is not
    while high - low > 1:
        middle = (low + high) // 2
        if cost_of(middle) <= budget:
            low = middle
        else:
            high = middle
    return low
