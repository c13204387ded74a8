"""Signals that end a run where it can be continued from, or there and then where nothing would be lost."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from training_nets import QUICK, final_state, fresh_net, loaders, untimed

from growfx.distributed import ranks
from growfx.runs.checkpoint import Checkpoints, content_digest
from growfx.training.interrupts import Interrupts, Stopped
from growfx.training.start import train

BOTH = pytest.mark.parametrize(
    ("number", "ending"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["term", "int"]
)


def ended(work: Callable[[Interrupts, list[str]], None]) -> tuple[BaseException, list[str]]:
    """How `work` under `Interrupts` ended, and what it had noted as done by then."""
    done: list[str] = []

    def under_interrupts() -> None:
        with Interrupts() as interrupts:
            work(interrupts, done)

    with pytest.raises(BaseException) as caught:
        under_interrupts()
    return caught.value, done


@BOTH
def test_a_signal_waits_for_the_next_check(number, ending):
    def work(interrupts, done):
        interrupts.check()
        signal.raise_signal(number)
        done.append("work under way")
        interrupts.check()
        done.append("work after the check")

    error, done = ended(work)
    assert done == ["work under way"]
    assert type(error) is ending
    assert isinstance(error.__cause__, Stopped)
    assert error.__cause__.number == number


@BOTH
def test_what_may_be_broken_off_is_broken_off_at_once(number, ending):
    def work(interrupts, done):
        try:
            with interrupts.at_once():
                try:
                    done.append("work")
                    signal.raise_signal(number)
                    done.append("more work")
                finally:  # only once: what is tidied up on the way out is not broken off in its turn
                    signal.raise_signal(signal.SIGTERM)
                    done.append("tidied up")
        finally:
            signal.raise_signal(signal.SIGTERM)
            done.append("put away")

    error, done = ended(work)
    assert done == ["work", "tidied up", "put away"]
    assert type(error) is ending


def test_a_signal_that_came_before_ends_what_may_be_broken_off_before_it_begins():
    def work(interrupts, done):
        signal.raise_signal(signal.SIGTERM)
        with interrupts.at_once():
            done.append("work")

    error, done = ended(work)
    assert done == []
    assert type(error) is SystemExit


def test_after_what_may_be_broken_off_a_signal_waits_again():
    def work(interrupts, done):
        with interrupts.at_once():
            done.append("work")
        signal.raise_signal(signal.SIGTERM)
        done.append("work of another kind")
        interrupts.check()

    error, done = ended(work)
    assert done == ["work", "work of another kind"]
    assert type(error) is SystemExit


def test_among_several_ranks_nothing_is_broken_off_that_others_wait_for(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "largest", lambda *numbers: list(numbers))

    def work(interrupts, done):
        with interrupts.at_once():
            signal.raise_signal(signal.SIGTERM)
            done.append("work of all ranks")
        interrupts.check()

    error, done = ended(work)
    assert done == ["work of all ranks"]
    assert type(error) is SystemExit


def test_all_ranks_end_for_a_signal_to_one_of_them(monkeypatch):
    monkeypatch.setattr(ranks, "largest", lambda number: [max(number, signal.SIGTERM)])
    error, _ = ended(lambda interrupts, _: interrupts.check())
    assert isinstance(error, SystemExit)
    assert error.code == 128 + signal.SIGTERM


def test_a_second_ctrl_c_ends_on_the_spot_and_a_second_sigterm_does_not():
    def work(_, done):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            done.append(number)

    error, done = ended(work)
    assert done == [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]
    assert type(error) is KeyboardInterrupt
    assert error.__cause__ is None  # no `Stopped`: nothing is put away


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_handlers_are_given_back_and_those_of_the_caller_stay(number):
    default = signal.getsignal(number)
    with Interrupts():
        assert signal.getsignal(number) is not default
    assert signal.getsignal(number) is default
    seen = []
    before = signal.signal(number, lambda *_: seen.append(number))
    own = signal.getsignal(number)
    try:
        with Interrupts() as interrupts:
            assert signal.getsignal(number) is own
            signal.raise_signal(number)
            interrupts.check()
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, before)
    assert seen == [number]


def test_outside_the_main_thread_nothing_is_taken_over():
    before, seen, failures = signal.getsignal(signal.SIGTERM), [], []

    def work() -> None:
        try:
            with Interrupts() as interrupts, interrupts.at_once():
                seen.append(signal.getsignal(signal.SIGTERM))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert seen == [before]


class Signalling(torch.utils.data.Dataset):
    """Images of which number `at` raises SIGTERM when it is asked for, once."""

    def __init__(self, data: torch.utils.data.Dataset, at: int) -> None:
        self.data, self.at, self.asked = data, at, []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int):
        self.asked.append(number)
        if number == self.at:
            self.at = -1
            signal.raise_signal(signal.SIGTERM)
        return self.data[number]


def run(out: Path, validation: DataLoader, test: DataLoader, *, resume: bool = False) -> None:
    settings = {"options": QUICK, "out": out, "resume": resume, "progress": False}
    train(fresh_net(), loaders()[0], validation, test_loader=test, **settings)


@pytest.mark.parametrize("which", ["validation", "test"])
def test_a_signal_in_an_evaluation_ends_it_there_and_the_run_continues_before_it(which, tmp_path):
    images = loaders()[1].dataset
    signalling = Signalling(images, at=11)  # the first batch is looked at before training
    plain, stopping = DataLoader(images, batch_size=8), DataLoader(signalling, batch_size=8)
    evaluated = (stopping, plain) if which == "validation" else (plain, stopping)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "parts", *evaluated)
    assert caught.value.code == 143
    assert signalling.asked[-1] == 11
    assert Checkpoints(tmp_path / "parts" / "checkpoint").exists()
    run(tmp_path / "parts", *evaluated, resume=True)
    run(tmp_path / "whole", plain, plain)
    digests = {content_digest(final_state(tmp_path / name)) for name in ("parts", "whole")}
    assert len(digests) == 1
    results = [untimed(json.loads((tmp_path / name / "result.json").read_text())) for name in ("parts", "whole")]
    assert results[0] == results[1]
