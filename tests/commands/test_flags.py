"""Flags made from the dataclasses of options."""

import dataclasses
import json

import click
import pytest

from growfx import methods
from growfx.cli import commands, main
from growfx.commands.flags import method_rows, option_texts
from growfx.options import DataOptions, TrainOptions


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def flags_of(command, *arguments):
    context = click.Context(commands.commands[command])
    given = ["m", "--data", "digits", "--out", "x", *arguments]
    with context:
        context.command.parse_args(context, list(given))
        return {flag for parameter in context.command.get_params(context) for flag in parameter.opts}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@pytest.mark.parametrize("name", methods.names())
def test_every_option_of_training_data_and_method_has_a_flag(name):
    flags = flags_of("grow") if name == "pwmpr" else flags_of("train", "--method", name)
    for kind in (TrainOptions, DataOptions, methods.kind_of(name)):
        assert {flag(field.name) for field in dataclasses.fields(kind) if field.init} <= flags


def test_a_comparison_has_the_flags_of_training_and_data():
    flags = flags_of("compare", "--methods", "dense")
    for kind in (TrainOptions, DataOptions):
        fields = {field.name for field in dataclasses.fields(kind)} - {"seed"}  # it has --seeds
        assert {flag(name) for name in fields} <= flags
    assert "--seed" not in flags


@pytest.mark.parametrize("name", methods.names())
def test_every_option_says_what_it_means(name):
    assert [row["flag"] for row in method_rows(name) if not row["meaning"]] == []
    for kind in (TrainOptions, DataOptions):
        assert set(option_texts(kind)) >= {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("command", ["grow", "train", "compare", "methods"])
def test_help_fits_a_hundred_columns(command, capsys):
    assert call(command, "--help") == 0
    assert max(map(len, capsys.readouterr().out.split("\n"))) <= 100


def test_the_list_of_methods_and_each_of_them_fit_a_hundred_columns_and_a_few(capsys):
    for name in ([], *([name] for name in methods.names())):
        assert call("methods", *name) == 0
        assert max(map(len, capsys.readouterr().out.split("\n"))) <= 125


def test_a_flag_of_another_method_is_wrong_usage_with_the_nearest_match(tmp_path, capsys):
    start = ["train", "test_resnet", "--data", "digits", "--out", tmp_path / "run", "--method", "rigl"]
    assert call(*start, "--growth-ratio", 2) == 2
    assert "--growth-ratio" in capsys.readouterr().err
    assert call(*start, "--drop-fractoin", 0.2) == 2
    assert "--drop-fraction" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_of_two_methods_the_last_counts_with_its_flags(tmp_path, capsys):
    start = ["train", "test_resnet", "--data", "digits", "--out", tmp_path / "run"]
    assert call(*start, "--method", "grasp", "--method", "rigl", "--drop-fraction", 2) == 1
    assert "`drop_fraction` = 2.0 is out of range" in capsys.readouterr().err
    assert call(*start, "--method", "rigl", "--method=grasp", "--drop-fraction", 0.2) == 2
    assert "--drop-fraction" in capsys.readouterr().err


def test_a_bad_value_is_answered_by_name_and_range(tmp_path, capsys):
    start = ["train", "test_resnet", "--data", "digits", "--out", tmp_path / "run", "--method=rigl"]
    assert call(*start, "--drop-fraction", 2) == 1
    assert "`drop_fraction` = 2.0 is out of range; allowed: (0, 1]" in capsys.readouterr().err
    assert call(*start, "--schedule", "cosin") == 1
    assert "`schedule`" in capsys.readouterr().err


def test_flags_and_set_give_the_same_run(tmp_path):
    common = ["test_resnet", "--data", "digits", "--quiet", "--method", "rigl", "--density", 0.2, "--epochs", 1]
    flags = ["--img-size", 16, "--kernels", "dense", "--drop-fraction", 0.2, "--no-channels-last", "--lr", 0.05]
    sets = ["img_size=16", "kernels=dense", "drop_fraction=0.2", "channels_last=false", "lr=0.05"]
    assert call("train", *common, *flags, "--out", tmp_path / "flags") == 0
    assert call("train", *common, *(part for text in sets for part in ("--set", text)), "--out", tmp_path / "sets") == 0
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("flags", "sets")]
    assert configs[0] == configs[1]
    assert configs[0]["method"]["drop_fraction"] == 0.2


def test_a_method_is_described_with_its_source_and_an_example(capsys):
    assert call("methods", "rigl", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert {row["flag"] for row in facts["options"]} >= {"--density", "--update-every", "--drop-fraction"}
    assert "Evci" in facts["about"]
    assert "--method rigl" in facts["example"]
    assert call("methods", "riggle") == 1
    assert "`rigl`" in capsys.readouterr().err
