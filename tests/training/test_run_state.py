"""Checkpoints that are not of this run are refused by the name of what differs; the others go on to the bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import some
from test_restarts import log_of
from torch import nn
from torch.utils.data import DataLoader, Dataset
from training_nets import QUICK, Tiny, final_state, fresh_net, interrupt_at, loaders

import growfx
from growfx.data.batches import SampleSeeded
from growfx.errors import CheckpointError
from growfx.runs.checkpoint import Checkpoints, content_digest
from growfx.training.start import train


def run(out: Path, net: Any = None, **changes: Any) -> None:
    train(net or fresh_net(), *loaders(), options=dataclasses.replace(QUICK, **changes), out=out, progress=False)


def resume(out: Path, net: Any = None, **how: Any) -> None:
    train(net or fresh_net(), *loaders(), options=QUICK, out=out, progress=False, resume=True, **how)


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("run") / "run"
    run(out)
    return Checkpoints(out / "checkpoint").load()[0]


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that has not got to its first checkpoint."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 0, 0)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert not Checkpoints(out / "checkpoint").exists()
    return out


def place(out: Path, state: Any) -> None:
    Checkpoints(out / "checkpoint").save(state, steps=6)


def without(state: dict[str, Any], *path: str) -> dict[str, Any]:
    key, *rest = path
    return {k: without(v, *rest) if k == key else v for k, v in state.items() if k != key or rest}


def changed(state: dict[str, Any], value: Any, *path: str) -> dict[str, Any]:
    key, *rest = path
    return {**state, key: changed(state[key], value, *rest) if rest else value}


def test_the_checkpoint_of_the_same_run_is_taken(begun, state):
    place(begun, state)
    resume(begun)
    assert content_digest(final_state(begun)["net"]) == content_digest(state["net"])


REFUSED = {
    "another option": (
        lambda s: changed(s, 0.5, "config", "train", "lr"),
        r"started with `train\.lr` = 0\.5, now .* 0\.1",
    ),
    "another seed": (
        lambda s: changed(s, 3, "config", "train", "seed"),
        r"started with `train\.seed` = 3, now it is 0",
    ),
    "a plain model's": (
        lambda s: changed(s, {k: v for k, v in s["net"].items() if not k.endswith(".mask")}, "net"),
        "holds a network without masks, a plain model's; load its weights with `net.load_state_dict`",
    ),
    "one mask missing": (
        lambda s: changed(s, {k: v for k, v in s["net"].items() if k != "conv2.mask"}, "net"),
        r"another model: this network has `conv2\.mask`, the checkpoint does not",
    ),
    "another layer": (
        lambda s: changed(s, {**s["net"], "conv9.weight": torch.zeros(2)}, "net"),
        r"another model: the checkpoint has `conv9\.weight`, this network does not",
    ),
    "another shape": (
        lambda s: changed(s, torch.zeros(5, 8), "net", "head.weight"),
        r"another model: `head\.weight` is \(5, 8\) there and \(4, 8\) in this network",
    ),
    "no network": (lambda s: without(s, "net"), "holds no network"),
    "no position": (lambda s: without(s, "position"), r"does not fit this run: it has no `position`"),
    "no cost": (lambda s: without(s, "cost"), r"does not fit this run: it has no `cost`"),
    "a position of another version": (
        lambda s: without(s, "position", "stage_step"),
        r"`position` has \['epoch', 'stage', 'steps'\], expected",
    ),
    "a method of another version": (
        lambda s: changed(s, {"method": "fixed"}, "method"),
        r"does not fit this run: `method` cannot be loaded",
    ),
    "an epoch of another version": (
        lambda s: changed(s, {"done": 3}, "part"),
        r"does not fit this run: `part` cannot be loaded \(it has no 'loss'\)",
    ),
    "another optimizer": (
        lambda s: changed(s, [], "optimizer", "param_groups"),
        r"does not fit this run: `optimizer` has parameter groups of \[\] parameters, expected \[",
    ),
    "another method": (
        lambda s: changed(s, {"method": "rigl", "steps": 3}, "method"),
        r"does not fit this run: `method` cannot be loaded \(the state is of method `rigl`, not `fixed`\)",
    ),
}


@pytest.mark.parametrize("what", some(REFUSED, lambda one: one in list(REFUSED)[::3]))
def test_what_is_not_of_this_run_is_refused_by_name_and_left_as_it_is(what, begun, state):
    change, message = REFUSED[what]
    place(begun, change(state))
    before = sorted(p.name for p in (begun / "checkpoint").iterdir())
    with pytest.raises(CheckpointError, match=message):
        resume(begun)
    assert sorted(p.name for p in (begun / "checkpoint").iterdir()) == before


def test_a_part_that_does_not_load_leaves_the_network_as_it_was(begun, state):
    place(begun, changed(state, {"done": 3}, "part"))
    net = fresh_net()
    before = content_digest(net.state_dict())
    assert before != content_digest(state["net"])
    with pytest.raises(CheckpointError, match="`part` cannot be loaded"):
        resume(begun, net)
    assert content_digest(net.state_dict()) == before


def test_memory_that_runs_out_is_not_called_a_checkpoint_of_another_run(begun, state, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    place(begun, state)
    monkeypatch.setattr(torch.optim.SGD, "load_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        resume(begun)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(2, 2).state_dict(), "it holds the state dict of a model with `weight`, `bias`"),
        ({"epoch": 3, "model": {}}, "it holds a dictionary with `epoch`, `model`"),
        (torch.zeros(3), "it holds a Tensor"),
    ],
)
def test_a_file_of_others_in_its_place_is_refused_by_what_it_is(content, message, begun):
    (begun / "checkpoint").mkdir(exist_ok=True)
    torch.save(content, begun / "checkpoint" / "latest.pt")
    with pytest.raises(CheckpointError, match=f"is not a growfx checkpoint; {message}"):
        resume(begun)


def test_another_network_or_method_is_refused_before_anything_is_read(begun, state):
    place(begun, state)
    other = growfx.wrap(Tiny(classes=5), torch.randn(1, 1, 8, 8))
    with pytest.raises(CheckpointError, match=r"`masks\.\w+` = "):
        resume(begun, other)
    with pytest.raises(CheckpointError, match=r"started with `method\.name` = None, now it is 'rigl'"):
        resume(begun, method=growfx.methods.create("rigl", density=0.3))


def test_a_log_with_a_torn_last_line_goes_on_as_a_whole_one(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    log = tmp_path / "parts" / "log.jsonl"
    log.write_text(log.read_text() + json.dumps({"event": "epoch"})[:-4])
    resume(tmp_path / "parts")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


class Drawn(Dataset[Any]):
    """Images that are drawn anew whenever they are loaded, as augmentation does."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, position: int) -> Any:
        return torch.randn(1, 8, 8), position % 4


class Seeded(SampleSeeded):
    def __len__(self) -> int:
        return 96

    def load(self, position: int) -> Any:
        return torch.randn(1, 8, 8), position % 4


@pytest.mark.parametrize(
    ("kind", "workers"),
    some([(Drawn, 0), (Seeded, 0), (Seeded, 2), (Drawn, 1)], lambda case: case in ((Drawn, 0), (Seeded, 2))),
)
def test_an_epoch_is_continued_in_its_order_and_augmentation(kind, workers, tmp_path, monkeypatch):
    def go(out: Path, **flags: Any) -> None:
        train_loader = DataLoader(kind(), 16, shuffle=True, drop_last=True, num_workers=workers)
        method = growfx.methods.create("rigl", density=0.3, update_every=2)
        options = dataclasses.replace(QUICK, epochs=2, checkpoint_minutes=0.0)
        train(fresh_net(), train_loader, loaders()[1], method=method, options=options, out=out, progress=False, **flags)

    go(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 4)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "parts")
    assert Checkpoints(tmp_path / "parts" / "checkpoint").load()[0]["part"]["done"] == 4
    go(tmp_path / "parts", resume=True)
    assert content_digest(final_state(tmp_path / "parts")) == content_digest(final_state(tmp_path / "whole"))
