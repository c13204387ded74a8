"""Seconds of training and of evaluation."""

import time
from contextlib import suppress

from training_nets import QUICK, fresh_net, interrupt_at, loaders

import growfx
from growfx.runs.folder import RunFolder
from growfx.training.clock import Clock
from growfx.training.step import TrainStep


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_waiting_is_wall_time_and_work_is_both():
    clock = Clock()
    with clock.training():
        busy(0.05)
    with clock.training():
        time.sleep(0.05)
    with clock.evaluating():
        time.sleep(0.02)
    seconds = clock.seconds()
    assert seconds["train_seconds"] >= 0.1
    assert 0.05 <= seconds["train_cpu_seconds"] < seconds["train_seconds"]
    assert 0.02 <= seconds["eval_seconds"] < seconds["train_seconds"]


def test_what_is_under_way_counts_once_and_is_taken_up_again():
    clock = Clock()
    with clock.training():
        busy(0.03)
        first = clock.seconds()
    assert 0.03 <= first["train_seconds"] <= clock.seconds()["train_seconds"] < 2 * first["train_seconds"] + 0.03
    later = Clock()
    later.load(first)
    with later.training():
        busy(0.03)
    assert later.seconds()["train_seconds"] >= first["train_seconds"] + 0.03


def test_a_resumed_run_reports_the_seconds_of_all_its_parts(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 3)
        with suppress(KeyboardInterrupt):
            growfx.train(fresh_net(), *loaders(), options=QUICK, out=out, progress=False)
    before = RunFolder.open(out).checkpoints.load()[0]["seconds"]
    assert min(before.values()) > 0
    result = growfx.train(fresh_net(), *loaders(), options=QUICK, out=out, progress=False, resume=True)
    assert all(getattr(result, name) > before[name] for name in before)
    stored = RunFolder.open(out).read_json("result.json")
    assert all(stored[name] == getattr(result, name) for name in before)


def test_the_time_of_an_epoch_is_that_of_all_its_parts(tmp_path, monkeypatch):
    out = tmp_path / "run"
    given = {"options": QUICK, "out": out, "progress": False, "checkpoint_minutes": 0}
    train_on = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda self, *window: (time.sleep(0.02), train_on(self, *window))[1])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0, 5)
        with suppress(KeyboardInterrupt):
            growfx.train(fresh_net(), *loaders(), **given)
    assert RunFolder.open(out).checkpoints.load()[0]["part"]["done"] == 5
    growfx.train(fresh_net(), *loaders(), **given, resume=True)
    first = next(record for record in RunFolder.open(out).read_log() if record["event"] == "epoch")
    assert first["seconds"] >= 6 * 0.02
