"""The README is short, and what it says of the command line is what the command line takes."""

import re
import shlex

import click
import pytest
from places import ROOT

from growfx.cli import commands

TEXT = (ROOT / "README.md").read_text()
RUNTIME = (ROOT / "docs" / "how" / "runtime.md").read_text()


def shown() -> list[str]:
    """The `growfx` command lines in the README's blocks of shell."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("growfx ")]


def test_the_readme_can_be_read_in_a_few_minutes() -> None:
    assert TEXT.count("\n") <= 150


@pytest.mark.parametrize("line", shown(), ids=lambda line: " ".join(line.split()[:3]))
def test_every_command_line_of_the_readme_is_taken(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = commands.commands[name]
    try:
        command.make_context(name, arguments)
    except click.UsageError as error:
        pytest.fail(f"{line}: {error.message}")


def test_every_command_is_in_the_readme() -> None:
    assert {name for name in commands.commands if f"growfx {name}" not in TEXT} == set()


def test_every_option_named_with_bench_is_one_of_its_own() -> None:
    section = RUNTIME.split("## Timing a network on this machine")[1]
    known = {text for option in commands.commands["bench"].params for text in (*option.opts, *option.secondary_opts)}
    named = set(re.findall(r"--[a-z][a-z-]*", section))
    assert {"--batch", "--threads", "--json", "--no-compile"} <= named <= known
