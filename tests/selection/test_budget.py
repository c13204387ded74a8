"""How many things a budget buys."""

import numpy as np
import pytest

from growfx.selection.budget import largest_within


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_longest_prefix_within_the_budget(seed):
    draw = np.random.default_rng(seed)
    total = np.concatenate([[0], np.cumsum(draw.integers(0, 5, 40))])
    for budget in (-1, 0, 3.5, float(total[17]), float(total[-1]), 1e9):
        asked = []

        def cost_of(count, asked=asked):
            asked.append(count)
            return float(total[count])

        expected = max((k for k in range(1, 41) if total[k] <= budget), default=0)
        assert largest_within(cost_of, budget, 40) == expected
        assert len(asked) <= 6
        assert 0 not in asked


def test_of_nothing_nothing_is_bought():
    assert largest_within(lambda count: 0.0, 10.0, 0) == 0
