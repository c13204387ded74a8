"""The command line. Commands import what they need when they run, so that `growfx --help` is quick."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from growfx.commands.flags import DATA_ONLY, OptionCommand
from growfx.commands.methods import DENSE, MAIN
from growfx.distributed.launch import RankError, process_group, speaks
from growfx.errors import ConfigError, GrowfxError, GrowfxWarning, did_you_mean, one_line
from growfx.notices import warn_once
from growfx.version import __version__

if TYPE_CHECKING:
    from growfx.commands.ray_cluster import Cluster

__all__ = ["main"]

_DATA_HELP = "`digits`, a folder with train/ and val/ or test/ of class folders, or a spec such as torch/cifar10"
_SET_HELP = "any option, as by its flag; an argument of MODEL by model.KEY=VALUE"
_CHECKPOINT_HELP = "start from a state dict of MODEL (.pth, .pt, .bin, .safetensors)"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a `GrowfxError`, 2 wrong usage, 130 interrupted."""
    try:
        with _warnings_as_lines():
            status = commands.main(arguments, prog_name="growfx", standalone_mode=False)
    except click.ClickException as error:
        if speaks():
            error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        if speaks():
            click.echo("growfx: interrupted", err=True)
        sys.exit(130)
    except RankError as error:
        if error.first:
            click.echo(f"growfx: {error}", err=True)
        sys.exit(1)
    except GrowfxError as error:
        if speaks():  # ranks that have not met fail alike
            click.echo(f"growfx: {one_line(error)}", err=True)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


@contextmanager
def _warnings_as_lines() -> Generator[None]:
    """Print each `GrowfxWarning` as one line; warnings of other libraries keep their form."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if not issubclass(category, GrowfxWarning):
                usual(message, category, *place, **options)
            elif speaks():
                click.echo(f"growfx: {message}", err=True)

        warnings.showwarning = show
        yield


class _Commands(click.Group):
    """The command group; on Ctrl-C it says how to resume where a command can."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            command = self.commands.get(ctx.invoked_subcommand or "")
            resumes = command is not None and any(parameter.name == "resume" for parameter in command.params)
            if speaks():
                how = "; `--resume` continues from the last checkpoint" if resumes else ""
                click.echo(f"\ngrowfx: interrupted{how}", err=True)
            return 130


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="growfx")
def commands() -> None:
    """Grow sparse networks: any timm, torchvision or own model, from a sparse seed to its plateau.

    MODEL is a timm name, torchvision/NAME or package.module:callable.
    """


def _listed(kind: Callable[[str], Any]) -> Callable[..., tuple[Any, ...]]:
    """A callback of click: values between commas, each of a kind."""

    def parse(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[Any, ...]:
        try:
            return tuple(kind(part.strip()) for part in text.split(",")) if text else ()
        except ValueError as error:
            raise click.BadParameter(f"`{text}` is not a list of numbers", context, parameter) from error

    return parse


def _exclude_option() -> Callable[..., Any]:
    return click.option(
        "--exclude",
        multiple=True,
        metavar="PATTERN",
        help="leave layers named like this without a mask (`aux*`); repeatable",
    )


def _weight_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where initial weights come from."""
    file = click.Path(path_type=Path)
    words = "start from the pretrained weights of MODEL's library (downloaded)"
    command = click.option("--checkpoint", type=file, metavar="FILE", help=_CHECKPOINT_HELP)(command)
    return click.option("--pretrained", is_flag=True, help=words)(command)


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that makes a run."""
    decorators = [
        click.argument("model"),
        click.option("--data", required=True, help=_DATA_HELP),
        click.option("--out", required=True, type=click.Path(path_type=Path), help="run folder"),
        click.option("--epochs", type=int, help="length of the (final) training"),
        click.option("--seed", type=int, default=0, show_default=True, help="of everything drawn"),
        _exclude_option(),
        _weight_options,
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help=_SET_HELP,
        ),
        click.option("--resume", is_flag=True, help="continue the run in --out (or start it)"),
        click.option("--overwrite", is_flag=True, help="replace the run in --out"),
        click.option("--json", "as_json", is_flag=True, help="print the result as JSON"),
        click.option("--quiet", is_flag=True, help="no progress bars"),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _complete_method(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The names that complete what was typed."""
    from growfx import methods

    return [name for name in (DENSE, *methods.names()) if name.startswith(incomplete) and name != MAIN]


@commands.command(cls=OptionCommand, method=MAIN)
@_run_options
@click.option("--seed-density", type=float, help="density growth starts from")
@click.option("--max-density", type=float, help="density growth ends at, plateau or not")
def grow(seed_density: float | None, max_density: float | None, **given: Any) -> None:
    """Grow MODEL on DATA until accuracy stops paying for density, train it, write the artifact."""
    densities = {"seed_density": seed_density, "max_density": max_density}
    _run(MAIN, {k: v for k, v in densities.items() if v is not None}, **given)


@commands.command(cls=OptionCommand)
@_run_options
@click.option(
    "--method",
    required=True,
    metavar="NAME",
    help="see `growfx methods`; or `dense`, the control",
    shell_complete=_complete_method,
)
@click.option("--density", type=float, help="density to train at")
def train(method: str, density: float | None, **given: Any) -> None:
    """Train MODEL on DATA by another method than growth, or as a dense control."""
    from growfx import methods

    allowed = [DENSE, *(n for n in methods.names() if n != MAIN)]
    if method not in allowed:
        hint = " (that one is `growfx grow`)" if method == MAIN else ""
        names = ", ".join(f"`{n}`" for n in allowed)
        near = did_you_mean(method, allowed)
        raise ConfigError(f"method `{method}` is unknown to `growfx train`{hint}; allowed: {names}{near}")
    if method == DENSE and density not in (None, 1.0):
        raise ConfigError(f"method `dense` has density 1; `--density {density}` contradicts it")
    _run(method, {} if density is None else {"density": density}, **given)


@commands.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="artifact folder")
@click.option("--native", type=click.Path(path_type=Path), help="folder with a C++ program that runs the network")
@click.option("--web", type=click.Path(path_type=Path), help="folder with a page that runs the network in a browser")
@click.option("--dense", is_flag=True, help="also write a dense model.safetensors that timm loads")
@click.option("--compact", is_flag=True, help="leave out units that the outputs do not need, fold norms")
@click.option("--onnx", type=click.Path(path_type=Path), help="also write the network (--compact or not) as ONNX file")
@click.option("--fixed-batch", is_flag=True, help="fix the batch size of the ONNX file")
@click.option("--best", is_flag=True, help="from the checkpoint of the best validation accuracy, not the last")
@click.option("--json", "as_json", is_flag=True, help="print the facts as JSON")
def export(run: Path, best: bool, as_json: bool, **targets: Any) -> None:
    """Write the artifact of a run from its checkpoint, or what runs it elsewhere; one of --out, --native, --web.

    The folder of --native needs a C++ compiler, and neither Python nor torch.
    """
    from growfx.commands.export import Targets, export_run

    try:
        chosen = Targets(**targets)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    facts, text = export_run(run, chosen, best=best)
    _show(facts, as_json, text)


@commands.command("inspect")
@click.argument("path")
@click.option("--set", "assignments", multiple=True, metavar="model.KEY=VALUE", help="argument of a named model")
@click.option("--json", "as_json", is_flag=True, help="print the facts as JSON")
def inspect_command(path: str, assignments: tuple[str, ...], as_json: bool) -> None:
    """Show the layers of an artifact, a run or a model by name: shape, nnz, density, bytes, alive units."""
    from growfx.commands.inspection import facts_of
    from growfx.options import parse_assignments
    from growfx.reporting.fitted import fitted_table, short_count, terminal_columns
    from growfx.reporting.run import layer_rows, percent

    facts = facts_of(path, parse_assignments(assignments, {})["model"])
    size = f", {facts['bytes']:,} bytes" if facts.get("bytes") else ""
    head = (
        f"{facts['kind']} {path}: {facts['model']}, density {percent(facts['density'])}, "
        f"{facts['nnz']:,} of {facts['numel']:,} masked weights active{size}"
    )
    cost = facts.get("cost")
    notes = [f"{short_count(cost['sparse'])} multiply-adds, {short_count(cost['dense'])} when dense"] if cost else []
    notes += [facts["alive_note"]] if facts.get("alive_note") else []
    drop = ("when dense", "bytes", "alive in", "shape", "multiply-adds")
    layers = fitted_table(layer_rows(facts["layers"]), terminal_columns(), wrap=("layer",), drop=drop)
    _show(facts, as_json, "\n".join([head, layers, *notes]))


@commands.command("eval", cls=OptionCommand, groups=DATA_ONLY)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--data", required=True, help=_DATA_HELP)
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="a data option, or device")
@click.option("--json", "as_json", is_flag=True, help="print the facts as JSON")
def eval_command(path: Path, data: str, split: str, assignments: tuple[str, ...], as_json: bool) -> None:
    """Measure the accuracy of an artifact or a run."""
    from growfx.commands.inspection import accuracy_of
    from growfx.reporting.run import percent

    facts = accuracy_of(path, data, split, assignments)
    _show(
        facts,
        as_json,
        f"{split} accuracy {percent(facts['accuracy'])} +- {percent(facts['standard_error'])} "
        f"({facts['images']:,} images)",
    )


def _launcher_options(tasks: str, more: str) -> Callable[[Any], Any]:
    """Flags that say where the parts of a large job are executed; `_cluster` reads them."""

    def add(command: Any) -> Any:
        for option in (
            click.option("--cpus-per-run", type=int, help="on a cluster; also threads of each  [default: 1]"),
            click.option("--address", metavar="HOST:PORT", help="of the Ray cluster's head  [default: auto]"),
            click.option(
                "--launcher",
                type=click.Choice(["local", "ray"]),
                default="local",
                show_default=True,
                help=f"where {tasks} go: processes here, or tasks of a Ray cluster{more}",
            ),
        ):
            command = option(command)
        return command

    return add


def _cluster(launcher: str, asked: Mapping[str, Any], memory: float | None = None) -> Cluster | None:
    """The cluster that the flags `asked` describe, None for this machine; ConfigError for flags that do nothing."""
    from growfx.commands.ray_cluster import Cluster

    given = {name: value for name, value in asked.items() if value is not None}
    if launcher == "ray":
        return Cluster(**{name.removesuffix("_per_run"): value for name, value in given.items()}, memory=memory)
    if given:
        flags = " and ".join(f"`--{name.replace('_', '-')}`" for name in given)
        raise ConfigError(f"{flags} can only be given with `--launcher ray`; give that too, or leave it out")
    return None


@commands.command("compare", cls=OptionCommand)
@click.argument("model")
@click.option("--data", required=True, help=_DATA_HELP)
@click.option("--methods", "names", required=True, callback=_listed(str), help="names between commas, `dense` too")
@click.option("--densities", callback=_listed(float), help="for the methods that are given one")
@click.option("--seeds", default="0", show_default=True, callback=_listed(int), help="one run each")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="folder of the comparison")
@click.option("--epochs", type=int, help="length of the (final) training")
@_exclude_option()
@_weight_options
@click.option("--set", "assignments", multiple=True, metavar="[METHOD.]KEY=VALUE", help="any other option")
@click.option("--sweep", "sweeps", multiple=True, metavar="METHOD.KEY=V1,V2", help="run a method with each value")
@click.option("--controls", is_flag=True, help="add controls of equal cost, and tickets with other masks or weights")
@click.option("--jobs", type=int, help="runs at the same time  [default: number of cores; 8 on an accelerator]")
@_launcher_options("runs", ", whose nodes share --out")
@click.option("--gpus-per-run", type=float, help="on a cluster; may be part of one  [default: 0]")
@click.option("--resume", is_flag=True, help="continue the comparison in --out (or start it)")
@click.option("--overwrite", is_flag=True, help="replace the comparison in --out")
@click.option("--json", "as_json", is_flag=True, help="print compare.json")
@click.option("--quiet", is_flag=True, help="no progress bar")
def compare_command(
    names: tuple[str, ...],
    sweeps: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    out: Path,
    launcher: str,
    address: str | None,
    cpus_per_run: int | None,
    gpus_per_run: float | None,
    **given: Any,
) -> int:
    """Train MODEL on DATA by several methods, densities and seeds; write a table, JSON and plots.

    Every run is an ordinary run folder in OUT/runs. A failing run does not stop the others; the status is then 1.
    """
    from growfx.commands.compare.comparison import compare
    from growfx.commands.compare.report import comparison_text

    values: dict[str, list[str]] = {}
    for text in sweeps:
        key, equals, listed = text.partition("=")
        if not equals or not listed:
            raise ConfigError(f"`--sweep {text}` has no values; write `--sweep METHOD.KEY=v1,v2`")
        values.setdefault(key, []).extend(listed.split(","))
    asked = {"address": address, "cpus_per_run": cpus_per_run, "gpus_per_run": gpus_per_run}
    cluster = _cluster(launcher, asked)
    facts = compare(methods=names, sweeps=values, out=out, progress=not quiet, cluster=cluster, **given)
    _show(facts, as_json, f"{comparison_text(facts)}\nwritten to {out}")
    if not facts["plots"] and len(facts["failures"]) < len(facts["runs"]):
        click.echo("growfx: matplotlib is not installed, so the plots were not drawn", err=True)
    return 1 if facts["failures"] else 0


@commands.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="the HTML file to write")
@click.option("--overwrite", is_flag=True, help="replace the report in --out")
@click.option("--json", "as_json", is_flag=True, help="print the facts as JSON")
def report_command(runs: tuple[Path, ...], out: Path, overwrite: bool, as_json: bool) -> None:
    """Write one HTML file about runs: growth, layers, cost; of several also side by side.

    RUN is a run folder, or the folder of a comparison. The file loads nothing and can be sent by mail.
    """
    from growfx.reporting.html import report

    written = report(runs, out, overwrite=overwrite)
    facts = {
        "path": str(written.path),
        "bytes": written.bytes,
        "runs": [str(run) for run in written.runs],
        "notes": list(written.notes),
    }
    _show(facts, as_json, str(written))


@commands.command("bench")
@click.argument("path")
@click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, help="batch size; repeatable  [default: 1]"
)
@click.option("--threads", type=click.IntRange(min=1), multiple=True, help="repeatable  [default: torch's own]")
@click.option("--img-size", type=click.IntRange(min=1), help="height and width  [default: as trained]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), help="times a row is timed  [default: about 10 s a table]")
@click.option("--compile/--no-compile", "with_compile", default=True, help="time torch.compile")
@click.option("--density", type=float, help="of random masks, when PATH is a model's name")
@click.option("--fresh", is_flag=True, help="time the sparse runtime's choices anew, whatever was kept")
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    default="wall",
    show_default=True,
    help="cpu: processor time of all threads, for a busy machine",
)
@click.option("--set", "assignments", multiple=True, metavar="model.KEY=VALUE", help="argument of a named model")
@click.option("--json", "as_json", is_flag=True, help="print all figures as JSON")
@click.option("--quiet", is_flag=True, help="no progress bar")
def bench_command(
    path: str,
    batches: tuple[int, ...],
    with_compile: bool,
    assignments: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Time PATH on this machine's CPU: dense torch, compiled, masked, compact, sparse and native runtime; onnxruntime,
    OpenVINO and DeepSparse where they are installed.

    PATH is an artifact, a run, or a model's name. A row that cannot run says why.
    """
    from growfx.commands.bench.measure import bench
    from growfx.commands.bench.variants import COMPILED, VARIANTS
    from growfx.options import parse_assignments

    report = bench(
        path,
        batches=batches or (1,),
        variants=[name for name in VARIANTS if with_compile or name != COMPILED],
        model_kwargs=parse_assignments(assignments, {})["model"],
        progress=not quiet,
        **given,
    )
    _show(report.to_json() if as_json else {}, as_json, str(report))


@commands.command("methods")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="print the facts as JSON")
def methods_command(name: str | None, as_json: bool) -> None:
    """List the methods with the defaults of their options, or the options of the method NAME."""
    from growfx.commands.methods import about_all, about_one

    facts, text = about_all() if name is None else about_one(name)
    _show(facts, as_json, text)


@commands.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the script that lets SHELL complete commands, flags, choices and files.

    bash: `eval "$(growfx completion bash)"` in ~/.bashrc. zsh: the same with zsh in ~/.zshrc. fish: `growfx completion
    fish > ~/.config/fish/completions/growfx.fish`.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise ConfigError(f"click has no completion for `{shell}`")
    click.echo(kind(commands, {}, "growfx", "_GROWFX_COMPLETE").source())


@commands.command("zoo")
@click.argument("pattern", default="*", metavar="[GLOB]")
@click.option(
    "--library",
    type=click.Choice(["timm", "torchvision", "guests"]),
    help="only models of this library; guests: of other packages, where they are installed",
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="keep all facts here; a later run continues it")
@click.option("--overwrite", is_flag=True, help="check again what FILE has; replace a file of other versions")
@click.option("--jobs", type=int, help="models checked at once  [default: number of cores; on a cluster what it holds]")
@click.option("--limit-seconds", type=float, default=300, show_default=True, help="time for one model")
@click.option("--limit-memory", type=float, help="GiB for one model (Linux)")
@_launcher_options("models", "")
@click.option(
    "--real-below",
    type=click.FloatRange(min=0),
    default=60,
    show_default=True,
    help="million parameters; larger models have shapes, but no values",
)
@click.option("--census", "with_census", is_flag=True, help="also print how many models hold each operator")
@click.option("--markdown", is_flag=True, help="print the table by family in Markdown")
@click.option("--quiet", is_flag=True, help="no progress bar")
def zoo_command(
    pattern: str,
    library: str | None,
    file: Path | None,
    overwrite: bool,
    jobs: int | None,
    limit_seconds: float,
    limit_memory: float | None,
    launcher: str,
    address: str | None,
    cpus_per_run: int | None,
    real_below: float,
    with_census: bool,
    markdown: bool,
    quiet: bool,
) -> int:
    """Check the architectures that GLOB matches (default: all of timm and torchvision): recorded, faithful to the
    model, no weight missed, path products, growth, artifact. GLOB may also be package.module:callable.

    `--library guests` checks small models of some thirty other packages (transformers, diffusers, ...) instead, with
    random weights; nothing is downloaded. Packages that are not installed are listed.
    """
    from growfx.commands.zoo.coverage import Results, check_zoo
    from growfx.commands.zoo.guests import GUESTS, go_offline, guest_names, guest_versions, missing_packages
    from growfx.commands.zoo.inputs import model_names
    from growfx.commands.zoo.pool import Limits
    from growfx.commands.zoo.table import census_text, coverage_text, summary_markdown

    limits = Limits(limit_seconds, limit_memory, jobs)
    cluster = _cluster(launcher, {"address": address, "cpus_per_run": cpus_per_run}, limit_memory)
    with_guests = library == GUESTS
    if with_guests:
        go_offline()
    names = guest_names(pattern) if with_guests else model_names(pattern, library)
    missing = f"not installed: {', '.join(missing_packages()) or 'none'}" if with_guests else ""
    if not names:
        where = f"the installed packages ({missing})" if missing else library or "timm or torchvision"
        raise ConfigError(f"no model of {where} is named like `{pattern}`")
    if overwrite and file is None:
        warn_once("`--overwrite` has no effect without a file of earlier results; give `--json FILE`", [])
    results = Results(file, overwrite=overwrite, packages=guest_versions() if with_guests else None)
    try:
        found = check_zoo(
            names,
            results,
            limits,
            real_below=1e6 * real_below,
            again=overwrite,
            progress=not quiet,
            cluster=cluster,
        )
    except KeyboardInterrupt:
        kept = f"; the same command continues from `{file}`" if file else ""
        click.echo(f"\ngrowfx: interrupted, {len(results.facts)} models are checked{kept}", err=True)
        return 130
    click.echo(summary_markdown(found) if markdown else coverage_text(found))
    if with_census:
        click.echo(f"\n{census_text(found)}")
    if missing:
        click.echo(f"\n{missing}")
    if file is not None:
        click.echo(f"\nwritten to {file}")
    return 0


def _run(
    method_name: str,
    method_options: dict[str, Any],
    *,
    model: str,
    data: str,
    out: Path,
    epochs: int | None,
    seed: int,
    exclude: tuple[str, ...],
    pretrained: bool,
    checkpoint: Path | None,
    assignments: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Assemble a run from the options of `grow` and `train`, and train."""
    import dataclasses

    from growfx.commands.compare.pool import RunSpec
    from growfx.reporting.run import result_rows, table

    spec = RunSpec.parse(
        model,
        data,
        method_name,
        assignments,
        seed=seed,
        epochs=epochs,
        method_options=method_options,
        exclude=exclude,
        pretrained=pretrained,
        checkpoint=checkpoint,
    )
    with process_group(spec.train_options.device):
        result = spec.run(out, resume=resume, overwrite=overwrite, progress=not quiet)
    if not speaks():
        return
    facts = dataclasses.asdict(result)
    _show(facts, as_json, f"{table(result_rows(facts))}\nwritten to {out}")


def _show(facts: Mapping[str, Any], as_json: bool, text: str) -> None:
    click.echo(json.dumps(facts, indent=2) if as_json else text)
