"""Runs that are broken off anywhere, again and again, and end as one that never was."""

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from training_nets import QUICK, final_state, fresh_net, loaders, untimed

import growfx
from growfx.runs.checkpoint import Checkpoints, content_digest
from growfx.training import run as run_module
from growfx.training.run import Run
from growfx.training.start import train
from growfx.training.step import TrainStep

pytestmark = pytest.mark.slow

SHORT = dataclasses.replace(QUICK, epochs=2, checkpoint_minutes=0.0)
METHODS: dict[str, dict[str, Any]] = {
    "pwmpr": {"seed_density": 0.1, "growth_ratio": 2.0, "max_density": 0.4, "epochs_per_round": 1},
    "grow-prune": {"seed_density": 0.1, "growth_ratio": 2.0, "max_density": 0.4, "epochs_per_round": 2},
    "rigl": {"density": 0.3, "update_every": 2},
    "channel-prune": {"budget": "flops=0.5", "update_every": 2},
    "channel-growth": {"growth_ratio": 1.6, "max_density": 0.6, "epochs_per_round": 1},
    "imp": {"density": 0.2, "levels": 2, "rewind_epochs": 0.5},
    "continuous": {"rounds": 2, "rewind_epochs": 0.5},
    "sup-tickets": {"density": 0.3, "tickets": 1, "cycle_epochs": 1, "update_every": 2},
}


def run(out: Path, name: str, *, resume: bool = False, **changes: Any) -> tuple[str, dict[str, Any]]:
    """The digest of the final network, and the result."""
    train_loader, val_loader = loaders(count=48)
    net = fresh_net()
    method = growfx.methods.create(name, **METHODS[name])
    options = dataclasses.replace(SHORT, **changes)
    result = train(
        net, train_loader, val_loader, method=method, options=options, out=out, resume=resume, progress=False
    )
    return content_digest(dict(net.state_dict())), untimed(dataclasses.asdict(result))


def log_of(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


class Killed(BaseException):
    """Stands for a process that is no more."""


def until_done(out: Path, name: str, monkeypatch: Any, lives: Any, owners: list[tuple[Any, str]]) -> tuple[int, Any]:
    """Continue the run until it is done; each process makes as many calls of `owners` as `lives` says."""
    for deaths, life in enumerate(lives):
        calls = 0

        def counted(real: Any, life: int = life) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > life:
                    raise Killed
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            for owner, function in owners:
                patch.setattr(owner, function, counted(getattr(owner, function)))
            try:
                return deaths, run(out, name, resume=True)
            except Killed:
                continue
    raise AssertionError("never done")


@pytest.mark.parametrize("name", METHODS)
def test_a_run_resumed_after_every_single_step_ends_as_one_that_was_never_interrupted(name, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", name, checkpoint_minutes=None)
    deaths, parts = until_done(
        tmp_path / "parts", name, monkeypatch, itertools.repeat(1, 200), [(TrainStep, "__call__")]
    )
    assert deaths == whole[1]["steps"] - 1
    assert parts == whole
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert content_digest(final_state(tmp_path / "parts")) == content_digest(final_state(tmp_path / "whole"))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_killed_in_validation_between_stages_or_while_it_saves_ends_the_same(name, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", name, checkpoint_minutes=None)
    kind = growfx.methods.kind_of(name)
    places = [(run_module, "evaluate"), (kind, "report"), (kind, "end_stage"), (Checkpoints, "save")]
    places += [(torch, "save"), (Run, "_log_epoch"), (run_module, "write_report")]
    draw = random.Random(name)
    lives = (draw.randrange(1, 14) for _ in range(300))
    deaths, parts = until_done(tmp_path / "parts", name, monkeypatch, lives, places)
    assert deaths >= 2
    assert parts == whole
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
