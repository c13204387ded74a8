"""Runs of `growfx.train` and of the commands that several processes make together."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from places import ROOT
from rank_processes import run_ranks, same
from torch.utils.data import DataLoader, DistributedSampler, Subset
from training_nets import QUICK, Tiny, final_state, fresh_net, loaders, untimed

import growfx
from growfx.distributed import ranks
from growfx.distributed.launch import RankError, process_group, speaks
from growfx.errors import CheckpointError, DataError, GrowfxError
from growfx.runs.checkpoint import content_digest, read
from growfx.training.step import TrainStep

pytestmark = pytest.mark.slow

METHODS = {
    "rigl": {"density": 0.3, "update_every": 2},
    "snip": {"density": 0.3, "score_batches": 2},
    "grasp": {"density": 0.3},
    "continuous": {"rounds": 1, "search_epochs": 2, "rewind_epochs": 0.5},
    "sup-tickets": {"density": 0.3, "tickets": 2, "cycle_epochs": 1, "base": "set", "update_every": 2},
    "imp": {"levels": 1, "density": 0.3, "rewind_epochs": 0.5},
    "gradient-growth": {"seed_density": 0.2, "max_density": 0.3, "epochs_per_round": 1},
    "pwmpr": {"seed_density": 0.2, "max_density": 0.3, "epochs_per_round": 1},
}


def rank_loaders(count: int = 83):
    """Every rank has its part of the images; the parts are filled up to be equal."""
    train, val = (loader.dataset for loader in loaders(count))
    sampler = DistributedSampler(train) if ranks.world_size() > 1 else None
    return DataLoader(train, batch_size=8, sampler=sampler, drop_last=True), DataLoader(val, batch_size=40)


class TwoHeads(torch.nn.Module):
    """With a second output, which no loss depends on."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__()
        self.first, self.second = Tiny(), torch.nn.Linear(64, 4)

    def forward(self, x):
        return self.first(x), self.second(x.flatten(1))


def uneven_loaders():
    """Rank 1 has as many images more as make two batches."""
    train, val = (loader.dataset for loader in loaders(83))
    part = Subset(train, range(40) if ranks.rank() == 0 else range(24, 80))
    return DataLoader(part, batch_size=8, shuffle=True, drop_last=True), DataLoader(val, batch_size=40)


def run(out: Path | None, name: str = "rigl", net: growfx.MaskedGraph | None = None, data=rank_loaders, **options):
    method = growfx.methods.create(name, **METHODS[name])
    net = net or fresh_net()
    result = growfx.train(net, *data(), method=method, out=out, options=QUICK, progress=False, **options)
    return untimed(dataclasses.asdict(result)), net.mask_digest(), weights(net)


def weights(net) -> str:
    return content_digest({name: value.detach() for name, value in net.named_parameters()})


def every_method() -> dict:
    found = {name: run(None, name) for name in METHODS}
    found["rigl over windows of two batches"] = run(None, accumulate=2, clip_grad=1.0)
    found["rigl with another head"] = run(None, net=growfx.wrap(TwoHeads(), torch.randn(1, 1, 8, 8)))
    found["rigl on parts that differ in length"] = run(None, data=uneven_loaders)
    return found | {f"rigl in {amp}": run(None, amp=amp) for amp in ("bf16", "fp16")}


class BreakError(Exception):
    pass


@contextmanager
def before_step(number: int, act: Callable[[], None]) -> Generator[None]:
    """Do something before the given step of a run, counted from 1."""
    train_on, steps = TrainStep.__call__, 0

    def stop(self, *window):
        nonlocal steps
        steps += 1
        if steps == number:
            act()
        return train_on(self, *window)

    TrainStep.__call__ = stop
    try:
        yield
    finally:
        TrainStep.__call__ = train_on


def broken_off(folder: Path) -> None:
    """Stop in the second epoch, with a checkpoint of every step."""

    def stop():
        raise BreakError

    with before_step(8, stop), pytest.raises(BreakError):
        run(folder, checkpoint_minutes=0)


def terminated(folder: Path) -> None:
    """Stop in the second epoch, because one of the ranks is asked to."""
    asked = ranks.rank() == ranks.world_size() - 1
    ask = partial(os.kill, os.getpid(), signal.SIGTERM) if asked else partial(int)
    with before_step(8, ask), pytest.raises(SystemExit) as end:
        run(folder)
    assert end.value.code == 128 + signal.SIGTERM


def interrupted_and_continued(folder: Path) -> dict:
    """A run in one go, and others that are stopped half way and continued."""
    found = {"whole": run(folder / "whole"), "methods": every_method()}
    for stop in (broken_off, terminated):
        name = stop.__name__
        stop(folder / name)
        ranks.on_first(partial(shutil.copy, folder / name / "checkpoint" / "latest.pt", folder / f"{name}.pt"))
        with pytest.raises(CheckpointError, match="exists; continue it with `--resume`"):
            run(folder / name)
        found[name] = run(folder / name, resume=True)
    return found


class Broken(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int):
        if ranks.rank() == 1 and index > 40:
            raise DataError("image `x.png` cannot be decoded")
        return torch.zeros(1, 8, 8), index % 4


def failing(how: str) -> bool:
    """A run that fails on rank 1 alone, in a group as torchrun's processes make it."""
    before = speaks()
    with process_group("cpu"):
        if how == "killed" and ranks.rank() == 1:
            os._exit(9)
        loader = DataLoader(Broken(), batch_size=4, sampler=DistributedSampler(Broken()))
        growfx.train(fresh_net(), loader, loaders()[1], options=QUICK, progress=False)
    return before


def command(arguments: list[str]) -> tuple[int, str, str]:
    """The command line in one of torchrun's processes: its status and what it printed."""
    import contextlib
    import io

    from growfx.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def commands(*lines: list[str]) -> list[tuple[int, str, str]]:
    found = []
    for line in lines:
        found.append(command(line))
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def results(folder):
    return same(run_ranks(interrupted_and_continued, 2, folder))


def test_every_rank_ends_with_the_same_weights_masks_and_result(results):
    for name, (result, digest, _) in results["methods"].items():
        assert result["mask_digest"] == digest, name
        assert result["val_accuracy"] >= 0.25
    assert results["methods"]["rigl on parts that differ in length"][0]["steps"] == 3 * 5


@pytest.mark.parametrize(("how", "reached"), [("broken_off", 7), ("terminated", 8)])
def test_a_run_of_two_ranks_continues_in_the_middle_of_an_epoch(results, folder, how, reached):
    assert results["whole"] == results[how]
    whole, parts = final_state(folder / "whole"), final_state(folder / how)
    assert content_digest(whole) == content_digest(parts)
    stopped = read(folder / f"{how}.pt")
    assert stopped["position"]["epoch"] == 1
    parts = [stopped["part"], *stopped["other_parts"]]
    assert [stopped["position"]["steps"] + part["done"] for part in parts] == [reached, reached]
    assert len({float(part["loss"]) for part in parts}) == 2, "each rank has its own"


def test_rank_0_alone_writes_and_the_run_is_whole(results, folder):
    log = [json.loads(line) for line in (folder / "whole" / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log if record["event"] == "epoch"] == [1, 2, 3]
    config = json.loads((folder / "whole" / "config.json").read_text())
    assert config["ranks"] == 2
    assert (folder / "whole" / "artifact").is_dir()
    assert not list((folder / "whole").rglob("*.new"))


def test_another_number_of_ranks_is_refused_by_name(results, folder):
    with pytest.raises(CheckpointError, match=r"was started with `ranks` = 2, now it is 1"):
        run(folder / "whole", resume=True)


@pytest.mark.parametrize(("how", "word"), [("data", "cannot be decoded"), ("killed", "lost the connection")])
def test_a_failing_rank_ends_all_and_one_of_them_says_why(how, word):
    first, second = run_ranks(failing, 2, how, launched=True)
    assert isinstance(first, RankError)
    assert isinstance(first, GrowfxError)
    assert word in str(first)
    if how == "data":
        assert isinstance(second, RankError)
        assert (first.first, second.first) == (False, True)
        assert str(second).startswith("DataError: ")
        assert str(second).endswith("(rank 1)")
    else:
        assert first.first


RUN = [
    "test_resnet",
    "--data",
    "digits",
    "--quiet",
    "--epochs",
    "1",
    *("--set", "img_size=16", "--set", "kernels=dense"),
]
SMALL = ["--set", "device=cpu", "--set", "batch_size=128"]


def test_commands_print_once_and_fail_once(tmp_path):
    line = ["train", *RUN, *SMALL, "--method", "static", "--density", "0.3", "--out", str(tmp_path / "run")]
    wrong, good, again, silly = 0, 1, 2, 3
    lines = [[*line, "--set", "epochs=none"], line, line, [*line, "--surprise"]]
    first, second = run_ranks(commands, 2, *lines, launched=True)
    assert [status for status, *_ in first] == [status for status, *_ in second] == [1, 0, 1, 2]
    assert all(out == "" for _, out, _ in second)
    assert first[good][1].count("validation accuracy") == 1
    assert "`epochs`" in first[wrong][2]
    assert second[wrong][2] == second[silly][2] == ""
    told = first[again][2] + second[again][2]
    assert told.startswith("growfx: CheckpointError: run folder")
    assert told.count("\n") == 1
    assert "--surprise" in first[silly][2]


def test_torchrun_grows_a_network(tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "growfx"]
    line += ["grow", *RUN, *SMALL, "--out", str(tmp_path / "run"), "--seed-density", "0.2", "--max-density", "0.25"]
    line += ["--set", "epochs_per_round=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["density"] <= 0.25
    assert done.stdout.count("written to") == 1
