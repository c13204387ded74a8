"""Real processes, killed and stopped by real signals, leave runs that end as if nothing had happened."""

import dataclasses
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from restart_processes import command_line, process_of
from test_restarts import log_of
from training_nets import QUICK, final_state, fresh_net, loaders, untimed

import growfx
from growfx.errors import CheckpointError
from growfx.runs.checkpoint import Checkpoints, content_digest
from growfx.runs.folder import RunFolder
from growfx.training.start import train

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

PATIENCE = 60.0  # seconds: a hang is a failure, a busy machine is none


def run(out: Path) -> None:
    """Train, or continue, with a checkpoint after every step: two rounds of growth, then the final training."""
    method = growfx.methods.create("pwmpr", seed_density=0.2, growth_ratio=2.0, max_density=0.4, epochs_per_round=1)
    options = dataclasses.replace(QUICK, epochs=2, checkpoint_minutes=0.0)
    train(fresh_net(), *loaders(), method=method, options=options, out=out, resume=True, progress=False)


def run_on_a_slow_disk(out: Path) -> None:
    """So slow that a save takes most of the time."""
    sync = os.fsync
    os.fsync = lambda handle: (time.sleep(0.03), sync(handle))[1]
    run(out)


def until(condition: Callable[[], bool], process: Any) -> None:
    """Wait until `condition()` is true or the process is no more."""
    end = time.monotonic() + PATIENCE
    while not condition() and process.is_alive():
        assert time.monotonic() < end, "the process does not get there"
        time.sleep(0.001)


@pytest.mark.slow
def test_a_run_whose_process_is_killed_at_random_moments_and_within_saves_ends_the_same(tmp_path):
    draw, out = random.Random(5), tmp_path / "parts"
    unfinished, done, checkpoints = out / "checkpoint" / "step.pt.new", out / "result.json", out / "checkpoint"
    deaths = torn = 0
    while not done.exists():
        known = set(Checkpoints(checkpoints).numbered())
        with process_of(run_on_a_slow_disk, out) as process:
            # not before it has got further, or a slow machine never gets to the end
            until(lambda known=known: not known >= set(Checkpoints(checkpoints).numbered()), process)
            time.sleep(draw.uniform(0.0, 0.2))
            if deaths % 2 == 0:
                until(unfinished.exists, process)
            process.kill()
            process.join(PATIENCE)
            deaths += process.exitcode == -signal.SIGKILL
        torn += unfinished.exists()
        assert deaths < 100
    assert deaths >= 2
    assert torn >= 1
    run(out)  # writes what was broken off after `result.json`, if it was
    run(tmp_path / "whole")
    assert content_digest(final_state(out)) == content_digest(final_state(tmp_path / "whole"))
    results = [untimed(json.loads((path / "result.json").read_text())) for path in (out, tmp_path / "whole")]
    assert results[0] == results[1]
    assert log_of(out) == log_of(tmp_path / "whole")
    assert not unfinished.exists()


@pytest.mark.slow
def test_a_run_in_use_is_refused_by_its_process_until_that_is_killed(tmp_path):
    out = tmp_path / "run"
    with process_of(run, out) as process:
        until(Checkpoints(out / "checkpoint").exists, process)
        os.kill(process.pid or 0, signal.SIGSTOP)  # it must not end meanwhile
        for flags in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(CheckpointError, match=rf"is in use by process {process.pid} on `.+`; wait for it"):
                train(fresh_net(), *loaders(), options=QUICK, out=out, progress=False, **flags)
        assert Checkpoints(out / "checkpoint").exists()
        process.kill()
        process.join(PATIENCE)
    run(out)  # what the lock of a killed process leaves is no lock
    assert RunFolder.open(out).read_json("result.json") is not None


def test_sigterm_ends_a_command_with_status_143_after_a_checkpoint_of_the_step_under_way(tmp_path):
    options = ["test_resnet", "--data", "digits", "--quiet", "--method", "static", "--density", 0.2, "--epochs", 2]
    options += ["--set", "img_size=16", "--set", "checkpoint_minutes=0", "--set", "kernels=dense"]
    out, said = tmp_path / "parts", tmp_path / "said.txt"
    with process_of(command_line, said, "train", *options, "--out", out) as process:
        until(Checkpoints(out / "checkpoint").exists, process)
        process.terminate()
        process.join(PATIENCE)
        assert process.exitcode == 143
    (step,) = re.findall(r"SIGTERM: stopped after step (\d+) of the run; .* resume continues from it", said.read_text())
    assert "Traceback" not in said.read_text()
    assert Checkpoints(out / "checkpoint").numbered()[0].stem == f"step-{int(step):012d}"
    assert RunFolder.open(out).read_json("result.json") is None
