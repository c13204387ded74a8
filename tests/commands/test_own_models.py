"""What commands do with the artifact of a caller's own model, which they cannot build."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from breadth import some
from error_facts import facts
from torch import nn

import growfx
from growfx.cli import main

COMMANDS = {"eval": ("--data", "digits"), "bench": ("--quiet", "--no-compile")}


def small(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, num_classes))


class Grey(nn.Module):
    """Takes images of one channel and one size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(144, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.reshape(len(x), 144))


class StatedGrey(Grey):
    pretrained_cfg: ClassVar[dict[str, object]] = {"input_size": (1, 12, 12)}


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "run"
    options = ("--img-size", 16, "--kernels", "dense", "--epochs", 1, "--quiet")
    spec = f"{__name__}:small"
    assert call("train", spec, "--data", "digits", "--method", "static", *options, "--out", path) == 0
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_the_run_to_give_in_place_of_the_artifact(run, tmp_path, capsys, command):
    capsys.readouterr()
    assert call(command, run / "artifact", *COMMANDS[command]) == 1
    said = capsys.readouterr().err
    assert re.search(facts("small", f"`{run}`", "growfx.load(path, model=instance)"), said)
    shutil.copytree(run / "artifact", tmp_path / "alone")
    assert call(command, tmp_path / "alone", *COMMANDS[command]) == 1
    said = capsys.readouterr().err
    assert re.search(facts("small", "folder of the run"), said)
    assert f"`{tmp_path}`" not in said


def test_the_run_that_is_named_is_evaluated(run, capsys):
    capsys.readouterr()
    assert call("eval", run, "--data", "digits", "--json") == 0
    result = json.loads((run / "result.json").read_text())
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["test_accuracy"]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_artifact_without_the_name_of_a_model_says_what_to_give(tmp_path, capsys, command):
    growfx.save(growfx.wrap(nn.Sequential(nn.Linear(4, 2)), torch.randn(1, 4)), tmp_path / "own")
    assert call(command, tmp_path / "own", *COMMANDS[command]) == 1
    said = capsys.readouterr().err
    assert re.search(facts("how its model is built", "in Python", "growfx.load(path, model=instance)"), said)


def test_a_report_names_the_command_that_follows_the_paths(run, tmp_path, capsys):
    assert call("report", run, "--out", tmp_path / "run.html") == 0
    assert "`growfx inspect` of the run" in (tmp_path / "run.html").read_text()
    capsys.readouterr()
    assert call("inspect", run, "--json") == 0
    assert all("alive_out" in layer for layer in json.loads(capsys.readouterr().out)["layers"])


GREY = {
    "train": ("--data", "digits", "--method", "dense", "--epochs", 1, "--kernels", "dense", "--quiet", "--out", "made"),
    "inspect": (),
    "bench": ("--quiet", "--no-compile", "--repeats", 1),
}


@pytest.mark.parametrize("command", some(GREY, lambda name: name == "inspect"))
def test_a_command_says_how_a_model_states_the_images_it_takes(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert call(command, f"{__name__}:Grey", *GREY[command]) == 1
    said = capsys.readouterr().err
    assert re.search(facts("`Grey`", "pretrained_cfg", "input_size"), said)
    assert "example_inputs" not in said
    assert call(command, f"{__name__}:StatedGrey", *GREY[command]) == 0
