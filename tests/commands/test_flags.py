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


@pytest.mark.parametrize("kind", [TrainOptions, DataOptions, *map(methods.kind_of, methods.names())])
def test_a_default_of_nothing_says_what_it_stands_for(kind):
    """Help and tables would say "none" of options that take a value by themselves."""
    empty = [field for field in dataclasses.fields(kind) if field.init and field.default in (None, "")]
    assert [field.name for field in empty if not field.metadata.get("unset")] == []


def test_help_and_the_table_of_a_method_show_the_default_that_counts(capsys):
    defaults = {row["flag"]: row["default"] for row in method_rows("channel-prune")}
    assert defaults["--budget"].startswith("flops=0.5")
    shown = ("--plan", "--exclude", "--floor", "--start", "--round-to")
    assert [defaults[flag] for flag in shown] == ["none", "none", "0.1", "0.0", "1"]
    assert call("methods", "channel-prune") == 0
    assert "flops=0.5" in capsys.readouterr().out
    context = click.Context(commands.commands["train"])
    with context:
        context.command.parse_args(context, ["m", "--data", "digits", "--out", "x", "--method", "channel-prune"])
        words = {
            flag: str(p.help)
            for p in context.command.get_params(context)
            for flag in p.opts
            if isinstance(p, click.Option)
        }
    assert "default: flops=0.5" in words["--budget"]
    assert "default: fits data and model" in words["--img-size"]
    assert "default: off" in words["--download"]


@pytest.mark.parametrize("command", ["grow", "train", "compare", "methods"])
def test_help_fits_a_hundred_columns(command, capsys):
    assert call(command, "--help") == 0
    assert max(map(len, capsys.readouterr().out.split("\n"))) <= 100


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_list_of_methods_and_each_of_them_fit_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ([], *([name] for name in methods.names())):
        assert call("methods", *name) == 0
        assert max(map(len, capsys.readouterr().out.split("\n"))) <= min(columns, 100)


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_inspect_fits_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert call("inspect", "test_efficientnet") == 0
    shown = capsys.readouterr().out
    table = shown.split("\n")[1:]
    assert max(map(len, table)) <= columns
    assert "multiply-adds" in shown
    assert ("left out" in shown) == (columns == 80)


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
    for given, words in (
        (["--schedule", "cosin"], "did you mean `cosine`?"),
        (["--lr", "fast"], "`lr` = `fast` is not of type float; allowed: (0, inf)"),
        (["--optimizer", "adamww", "--img-size", 16], "did you mean `adamw`?"),
        (["--set", "learning_rate=1"], "option `learning_rate` is unknown"),
        (["--device", "tpu"], "`device` = `tpu` cannot be used"),
    ):
        assert call(*start, *given) == 1
        assert words in capsys.readouterr().err
    assert call("train", "test_resnet", "--data", "digits", "--out", tmp_path / "run", "--method=riggle") == 1
    assert "did you mean `rigl`?" in capsys.readouterr().err
    assert call("compare", "test_resnet", "--data", "digits", "--out", tmp_path / "run", "--methods=stattic") == 1
    assert "did you mean `static`?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "text", "words"),
    [
        (["--lr", "0.05"], "lr=0.1", ["`--set lr=0.1`", "`--lr 0.05`", "`lr` once"]),
        (["--no-channels-last"], "channels_last=true", ["`--no-channels-last`"]),
        (["--epochs", "3"], "epochs=4", ["`--epochs 3`"]),
        (["--density", "0.3"], "density=0.2", ["`--density 0.3`"]),
        (["--drop-fraction", "0.3"], "drop_fraction=0.2", ["`--drop-fraction 0.3`"]),
        (["--seed", "1"], "seed=2", ["`--seed 1`"]),
    ],
)
def test_set_that_contradicts_a_flag_is_refused_by_name(tmp_path, capsys, flag, text, words):
    start = ["train", "test_resnet", "--data", "digits", "--out", tmp_path / "run", "--method=rigl"]
    assert call(*start, *flag, "--set", text) == 1
    shown = capsys.readouterr().err
    assert [word for word in words if word not in shown] == []
    assert not (tmp_path / "run").exists()


def test_set_that_says_what_a_flag_says_is_taken(tmp_path, capsys):
    start = ["train", "nowhere", "--data", "digits", "--out", tmp_path / "run", "--method=rigl"]
    same = ["--lr", "0.10", "--set", "lr=0.1", "--channels-last", "--set", "channels_last=true"]
    assert call(*start, *same) == 1
    assert "model `nowhere` is unknown" in capsys.readouterr().err


def test_flags_and_set_give_the_same_run(tmp_path):
    common = ["test_resnet", "--data", "digits", "--quiet", "--method", "rigl", "--density", 0.2, "--epochs", 1]
    flags = ["--img-size", 16, "--kernels", "dense", "--drop-fraction", 0.2, "--no-channels-last", "--lr", 0.05]
    flags += ["--update-every", 2]
    sets = ["img_size=16", "kernels=dense", "drop_fraction=0.2", "channels_last=false", "lr=0.05", "update_every=2"]
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


def test_eval_has_the_flags_that_change_what_is_read_and_where(capsys):
    context = click.Context(commands.commands["eval"])
    flags = {flag for parameter in context.command.get_params(context) for flag in parameter.opts}
    assert {"--batch-size", "--workers", "--data-dir", "--device", "--img-size"} <= flags
    assert not {"--lr", "--hflip"} & flags


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_gets_a_script_for_completion(shell, monkeypatch, capsys):
    monkeypatch.setattr("click.shell_completion.BashComplete._check_version", lambda *_: None)
    assert call("completion", shell) == 0
    script = capsys.readouterr().out
    assert "_GROWFX_COMPLETE" in script
    assert "growfx" in script


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("growfx in", {"inspect"}),
        ("growfx train m --sched", {"--schedule"}),
        ("growfx train m --schedule co", {"cosine", "constant"}),
        ("growfx train m --method ri", {"rigl", "rigl-sg", "rigl-sm"}),
        ("growfx completion z", {"zsh"}),
    ],
)
def test_the_shell_completes_commands_flags_and_choices(typed, expected):
    from click.shell_completion import ShellComplete

    *arguments, incomplete = typed.split()[1:]
    found = ShellComplete(commands, {}, "growfx", "_GROWFX_COMPLETE").get_completions(arguments, incomplete)
    assert {item.value for item in found} == expected
