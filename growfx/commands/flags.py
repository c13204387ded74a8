"""Make flags of the command line from the dataclasses of options: one source for Python, `--set` and flags."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from growfx.errors import ConfigError
from growfx.options import DataOptions, TrainOptions, describe_default, describe_range

__all__ = ["DATA_ONLY", "OptionCommand", "method_rows", "option_texts"]

_PREFIX = "set_"  # of the parameter names of generated flags
_METHOD = "growfx.method"
_SEVERAL = re.compile(r"^(\w+(?:, \w+)*): (.*)$")
# What has flags: a dataclass of options, the title of its group in the help, and of which fields (None: of all).
_Groups = tuple[tuple[type, str, tuple[str, ...] | None], ...]
_TRAINING: _Groups = ((TrainOptions, "Training", None), (DataOptions, "Data", None))
_READING = ("batch_size", "img_size", "workers", "val_fraction", "split_seed", "data_dir", "download")
DATA_ONLY: _Groups = ((DataOptions, "Data", _READING), (TrainOptions, "Machine", ("device",)))


class OptionCommand(click.Command):
    """A command with a flag for every field of `TrainOptions` and `DataOptions`, and of the method that is named.

    What is given by flags is added to the parameter `assignments`, as `--set KEY=VALUE` is; an option given by both
    must have one value. Flags that the command defines itself stay its own. The method is `method`, or what follows
    `--method`; its flags are known only once it is named, and a flag of another method is wrong usage.
    """

    def __init__(self, *args: Any, method: str | None = None, groups: _Groups = _TRAINING, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method, self.has_methods = method, groups is _TRAINING
        own = {flag for parameter in self.params for flag in parameter.opts}
        own |= {"--seed"} if "--seeds" in own else set()  # a comparison has several
        for kind, title, names in groups:
            self.params += _flags(kind, title, own, names)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with the flags of the method that the arguments name."""
        # Help and completion need no method, and shall be quick.
        if self.has_methods and not ctx.resilient_parsing and not {"-h", "--help"} & set(args):
            ctx.meta[_METHOD] = self._method_flags(args)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's parameters, and those of the method."""
        return [*super().get_params(ctx), *ctx.meta.get(_METHOD, ())]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with what was given by flags among its `assignments`."""
        given = {name: value for name, value in ctx.params.items() if name.startswith(_PREFIX)}
        ctx.params = {name: value for name, value in ctx.params.items() if name not in given}
        values = {name.removeprefix(_PREFIX): value for name, value in given.items() if value is not None}
        typed = {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        _refuse_contradiction({**{name: ctx.params[name] for name in typed}, **values}, ctx.params["assignments"])
        ctx.params["assignments"] = (*(f"{k}={v}" for k, v in values.items()), *ctx.params["assignments"])
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, the command's own first, the others by what they are about."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for name, rows in groups.items():
            with formatter.section(name):
                formatter.write_dl(rows)
        if self.has_methods:
            with formatter.section("Method"):
                formatter.write_text("`growfx methods NAME` lists the flags of a method.")

    def _method_flags(self, args: list[str]) -> list[click.Parameter]:
        from growfx import methods

        name = self.method or _after("--method", args)
        own = {flag for parameter in self.params for flag in parameter.opts}
        return _flags(methods.kind_of(name), f"Method {name}", own) if name in methods.names() else []


def _after(flag: str, args: Iterable[str]) -> str | None:
    """The value of a flag among arguments, as `FLAG VALUE` or `FLAG=VALUE`: the last, as for click."""
    args, found = list(args), None
    for i, argument in enumerate(args):
        if argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
        if argument == flag and i + 1 < len(args):
            found = args[i + 1]
    return found


def _refuse_contradiction(flags: Mapping[str, Any], assignments: Iterable[str]) -> None:
    """Raise `ConfigError` where `--set` gives an option another value than its flag does."""
    for text in assignments:
        key, _, value = text.partition("=")
        if key in flags and not _same(str(flags[key]), value):
            flag = f"--{key.replace('_', '-')}"
            shown = {True: flag, False: f"--no-{flag[2:]}"}.get(flags[key]) if isinstance(flags[key], bool) else None
            raise ConfigError(f"`--set {text}` contradicts `{shown or f'{flag} {flags[key]}'}`; give `{key}` once")


def _same(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one.lower() == other.lower()


class _FieldOption(click.Option):
    """A flag made from a field; values among a few are completed by the shell."""

    group: str
    choices: tuple[str, ...] = ()

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.choices if name.startswith(incomplete)]


def _flags(kind: type, group: str, taken: set[str], names: tuple[str, ...] | None = None) -> list[click.Parameter]:
    """One flag for each field of a dataclass of options (of `names`, where given) whose flag is not taken."""
    texts, flags = option_texts(kind), []
    hints = typing.get_type_hints(kind)
    for field in _fields(kind):
        flag = f"--{field.name.replace('_', '-')}"
        if flag in taken or (names is not None and field.name not in names):
            continue
        words = f"{texts.get(field.name, '')}  [{_limits(field)}]".strip()
        if hints[field.name] is bool:
            option = _FieldOption([f"{flag}/--no-{flag[2:]}", _PREFIX + field.name], default=None, help=words)
        else:
            metavar = _metavar(hints[field.name], field.metadata)
            option = _FieldOption([flag, _PREFIX + field.name], default=None, metavar=metavar, help=words)
        option.group, option.choices = group, tuple(field.metadata.get("choices") or ())
        flags.append(option)
    return flags


def _fields(kind: Any) -> Iterator[dataclasses.Field[Any]]:
    return (field for field in dataclasses.fields(kind) if field.init)


def _metavar(hint: Any, limits: Mapping[str, Any]) -> str:
    if limits.get("choices"):
        return "|".join(limits["choices"])
    kinds = [getattr(part, "__name__", str(part)).upper() for part in typing.get_args(hint) or (hint,)]
    return "|".join("NONE" if kind == "NONETYPE" else kind for kind in kinds)


def _limits(field: dataclasses.Field[Any]) -> str:
    default = describe_default(field)
    allowed = "" if field.metadata.get("choices") else describe_range(field.metadata)  # the flag shows choices
    return f"default: {default}" + (f"; allowed: {allowed}" if allowed else "")


def option_texts(kind: type) -> dict[str, str]:
    """Say what each field of a dataclass means: the first sentence of its entry under `Attributes:`."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = (vars(base).get("__doc__") or "").partition("Attributes:\n")[2]
        entry: list[str] = []
        for line in [*text.split("\n"), "        end: ."]:
            new = _SEVERAL.match(line[8:]) if line.startswith("        ") and line[8:9].strip() else None
            if new and entry:
                names, words = entry[0], " ".join(entry[1:])
                found.update(dict.fromkeys(names.split(", "), _first_sentence(words)))
            if new:
                entry = [new.group(1), new.group(2)]
            elif line.strip() and entry:
                entry.append(line.strip())
    return found


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z0-9)`\"])[.;:] ", text, maxsplit=1)[0].rstrip(".")


def method_rows(name: str) -> list[dict[str, str]]:
    """The options of the method `name` as rows for a table: flag, default, allowed values, meaning."""
    from growfx import methods

    kind = methods.kind_of(name)
    texts = option_texts(kind)
    rows = []
    for field in _fields(kind):
        rows.append(
            {
                "flag": f"--{field.name.replace('_', '-')}",
                "default": describe_default(field),
                "allowed": describe_range(field.metadata) or "any",
                "meaning": texts.get(field.name, ""),
            }
        )
    return rows
