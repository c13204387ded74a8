"""Make flags of the command line from the dataclasses of options: one source for Python, `--set` and flags."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from growfx.options import DataOptions, TrainOptions, describe_range

__all__ = ["OptionCommand", "method_rows", "option_texts"]

_PREFIX = "set_"  # of the parameter names of generated flags
_METHOD = "growfx.method"
_SEVERAL = re.compile(r"^(\w+(?:, \w+)*): (.*)$")


class OptionCommand(click.Command):
    """A command with a flag for every field of `TrainOptions` and `DataOptions`, and of the method that is named.

    What is given by flags is added to the parameter `assignments`, as `--set KEY=VALUE` is. Flags that the command
    defines itself stay its own. The method is `method`, or what follows `--method`; its flags are known only once it is
    named, and a flag of another method is wrong usage.
    """

    def __init__(self, *args: Any, method: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method
        own = {flag for parameter in self.params for flag in parameter.opts}
        own |= {"--seed"} if "--seeds" in own else set()  # a comparison has several
        self.params += _flags(TrainOptions, "Training", own)
        self.params += _flags(DataOptions, "Data", own)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with the flags of the method that the arguments name."""
        if not {"-h", "--help"} & set(args):  # which needs no method, and shall be quick
            ctx.meta[_METHOD] = self._method_flags(args)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's parameters, and those of the method."""
        return [*super().get_params(ctx), *ctx.meta.get(_METHOD, ())]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with what was given by flags among its `assignments`."""
        given = {name: value for name, value in ctx.params.items() if name.startswith(_PREFIX)}
        ctx.params = {name: value for name, value in ctx.params.items() if name not in given}
        texts = [f"{name.removeprefix(_PREFIX)}={value}" for name, value in given.items() if value is not None]
        ctx.params["assignments"] = (*texts, *ctx.params["assignments"])
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


class _FieldOption(click.Option):
    group: str


def _flags(kind: type, group: str, taken: set[str]) -> list[click.Parameter]:
    """One flag for each field of a dataclass of options whose flag is not taken."""
    texts, flags = option_texts(kind), []
    hints = typing.get_type_hints(kind)
    for field in _fields(kind):
        flag = f"--{field.name.replace('_', '-')}"
        if flag in taken:
            continue
        words = f"{texts.get(field.name, '')}  [{_limits(field)}]".strip()
        if hints[field.name] is bool:
            option = _FieldOption([f"{flag}/--no-{flag[2:]}", _PREFIX + field.name], default=None, help=words)
        else:
            metavar = _metavar(hints[field.name], field.metadata)
            option = _FieldOption([flag, _PREFIX + field.name], default=None, metavar=metavar, help=words)
        option.group = group
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
    default = field.default if field.default is not dataclasses.MISSING else "as the docstring says"
    shown = "none" if default is None else default
    allowed = describe_range(field.metadata)
    return f"default: {shown}" + (f"; allowed: {allowed}" if allowed else "")


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
        default = "none" if field.default is None else str(field.default)
        rows.append(
            {
                "flag": f"--{field.name.replace('_', '-')}",
                "default": default,
                "allowed": describe_range(field.metadata) or "any",
                "meaning": texts.get(field.name, ""),
            }
        )
    return rows
