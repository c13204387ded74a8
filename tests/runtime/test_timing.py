import random

import pytest
import torch

from growfx.runtime.timing import Timing, in_turn, thread_count


def test_every_round_runs_every_call_twice_in_an_order_of_its_own():
    made: list[str] = []
    timings, errors = in_turn({name: (lambda name=name: made.append(name)) for name in "abcd"}, 6, seed=3)
    assert not errors
    assert all(len(timing.seconds) == 6 for timing in timings.values())
    pairs = list(zip(made[::2], made[1::2], strict=True))
    assert all(first == second for first, second in pairs)
    orders = ["".join(first for first, _ in pairs[i : i + 4]) for i in range(0, 24, 4)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 1


def test_the_same_seed_gives_the_same_orders():
    def orders() -> list[str]:
        made: list[str] = []
        in_turn({name: (lambda name=name: made.append(name)) for name in "abc"}, 4)
        return made

    first = orders()
    random.seed(1)
    assert orders() == first


def test_a_call_that_fails_is_left_out_and_the_others_go_on():
    count = 0

    def fails_later() -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise RuntimeError("no more")

    timings, errors = in_turn({"good": lambda: None, "bad": fails_later}, 5)
    assert set(timings) == {"good"}
    assert len(timings["good"].seconds) == 5
    assert str(errors["bad"]) == "no more"
    assert count == 4


def test_a_speedup_is_the_median_of_the_rounds_so_that_drift_does_not_decide():
    slow, fast = Timing((4.0, 40.0, 400.0)), Timing((2.0, 20.0, 100.0))
    assert fast.speedup_over(slow) == 2.0
    assert (fast.minimum, fast.median) == (2.0, 20.0)
    with pytest.raises(ValueError):
        fast.speedup_over(Timing((1.0,)))


def test_threads_are_restored_after_an_error_too():
    def fails() -> None:
        with thread_count(2):
            assert torch.get_num_threads() == 2
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert torch.get_num_threads() == 1
