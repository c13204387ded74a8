"""Methods side by side: every method at every density and seed, at equal cost where asked for, in one folder.

`DIR/runs/` holds ordinary run folders; `table.txt`, `compare.json` and two plots are made of their results. Finished
runs are kept, interrupted ones continued.
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from growfx import methods
from growfx.commands.compare.cluster import run_all_on
from growfx.commands.compare.pool import Report, RunSpec, field_names, processes, run_all
from growfx.commands.compare.progress import Meter, finished
from growfx.commands.compare.report import FORMAT, run_facts, write_comparison
from growfx.commands.methods import DENSE
from growfx.commands.ray_cluster import Cluster
from growfx.commands.starting_weights import file_digest
from growfx.distributed.launch import launched
from growfx.errors import CheckpointError, ConfigError, did_you_mean
from growfx.machine import versions
from growfx.methods.growth.rounds import Growing
from growfx.notices import hearing
from growfx.options import DataOptions, TrainOptions, parse_assignments
from growfx.runs.folder import RunFolder, refuse_existing
from growfx.training.recipe import private_randomness

# Executes runs (name, options, folder) and reports on them.
Launch = Callable[[Sequence[tuple[str, RunSpec, Path]]], Generator[Report]]

__all__ = ["Comparison", "FinishedRun", "Planned", "compare", "plan_controls"]

_FRESH = 1000  # added to the seed of a run for weights that are not its own
_WHERE = {"device", "workers", "cache_mb", "data_dir", "download"}  # may change between start and continuation
_OWN_FLAGS = {"seed": "--seeds", "density": "--densities"}
_CONTROLS = ("phew", "ticket", DENSE)
_FROM = ("exclude", "pretrained", "checkpoint")


@dataclass(frozen=True)
class Planned:
    """A run of a comparison.

    Attributes:
        name: of its folder.
        label, asked: the row of the table it belongs to: what it is, and the density asked for (None: an outcome).
        control: whether it is there to be compared with another run.
    """

    name: str
    spec: RunSpec
    label: str
    asked: float | None
    control: bool = False


@dataclass(frozen=True)
class FinishedRun:
    """The epochs of a finished run and its final density, from which its controls are planned."""

    epochs: int
    density: float


@dataclass(frozen=True)
class Comparison:
    """What is compared; `compare` says what the fields mean. Raises `ConfigError` where they do not fit together."""

    model: str
    data: str
    methods: tuple[str, ...]
    densities: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    epochs: int | None = None
    assignments: tuple[str, ...] = ()
    sweeps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    controls: bool = False
    exclude: tuple[str, ...] = ()
    pretrained: bool = False
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if not self.methods or not self.seeds:
            raise ConfigError("nothing to compare; give at least one method and one seed")
        kinds = self._kinds()  # unknown methods end here
        if self.densities and not any(_takes_density(kind) for kind in kinds.values()):
            raise ConfigError(
                "none of these methods has a density to be given, so `--densities` would do nothing; growth ends at "
                "`max_density` or before"
            )
        general = [text for text in self.assignments if "." not in text.partition("=")[0]]
        parse_assignments(general, {"data": DataOptions, "train": TrainOptions, **kinds})
        for key in (text.partition("=")[0] for text in self.assignments):
            self._check_key(key, "--set")
        for key, values in self.sweeps.items():
            self._check_key(key, "--sweep")
            if not values or key.partition(".")[0] not in self.methods or "." not in key:
                raise ConfigError(f"`--sweep {key}` is not of a compared method; write `--sweep METHOD.KEY=v1,v2`")
            if set_too := next((text for text in self.assignments if text.partition("=")[0] == key), None):
                raise ConfigError(f"`--set {set_too}` contradicts `--sweep {key}={','.join(values)}`; give one of them")

    def _kinds(self) -> dict[str, type]:
        """Option classes of the compared methods."""
        allowed = [DENSE, *methods.names()]
        unknown = next((name for name in self.methods if name not in allowed), None)
        if unknown is not None:
            names = ", ".join(f"`{name}`" for name in allowed)
            raise ConfigError(f"method `{unknown}` is unknown; allowed: {names}{did_you_mean(unknown, allowed)}")
        return {name: methods.kind_of(name) for name in self.methods if name != DENSE}

    def _check_key(self, key: str, flag: str) -> None:
        owner, dot, own = key.rpartition(".")
        allowed = ("model", *self.methods, *(_CONTROLS if self.controls else ()))
        if dot and owner not in allowed:
            names = ", ".join(f"`{name}`" for name in dict.fromkeys(allowed))
            raise ConfigError(
                f"`{flag} {key}` is for `{owner}`, which is not compared; allowed before the dot: {names}"
            )
        outcome = own == "density" and dot and owner not in ("model", DENSE) and not _takes_density(_kind(owner))
        if self.densities and own == "budget":
            raise ConfigError(f"`{flag} {key}` contradicts `--densities`, which are budgets of parameters; give one")
        if own in _OWN_FLAGS and owner != "model" and not outcome:
            raise ConfigError(f"`{flag} {key}` would be the same for all runs; give it by `{_OWN_FLAGS[own]}`")

    def config(self) -> dict[str, Any]:
        """Return what the comparison is as JSON values; two are the same comparison when these are."""
        parts = [text.partition("=") for text in self.assignments]
        options = {key: value for key, _, value in parts}
        return {
            "model": self.model,
            "epochs": self.epochs,
            "set": {key: value for key, value in options.items() if key.rpartition(".")[2] not in _WHERE},
            "methods": list(self.methods),
            "densities": list(self.densities),
            "seeds": list(self.seeds),
            "sweep": {key: list(values) for key, values in self.sweeps.items()},
            "controls": self.controls,
            "exclude": list(self.exclude),
            "pretrained": self.pretrained,
            "checkpoint": None if self.checkpoint is None else file_digest(self.checkpoint),
        }

    def runs(self) -> list[Planned]:
        """Return all runs but the controls."""
        planned = [run for name in self.methods for run in self._runs_of(name)]
        names = [run.name for run in planned]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"two runs would share the folder `{twice}`; give every method, density and value once")
        return planned

    def _runs_of(self, method: str) -> Iterable[Planned]:
        swept = {key.partition(".")[2]: values for key, values in self.sweeps.items() if key.startswith(f"{method}.")}
        sized = method != DENSE and _takes_density(_kind(method))
        densities: Sequence[float | None] = (self.densities or (None,)) if sized else (None,)
        for values in itertools.product(*swept.values()):
            chosen = [f"{key}={value}" for key, value in zip(swept, values, strict=True)]
            for density, seed in itertools.product(densities, self.seeds):
                spec = self.spec(method, seed, chosen, {} if density is None else _sized(_kind(method), density))
                parts = [method, *([] if density is None else [f"d{density:g}"]), *chosen, f"s{seed}"]
                asked = _asked(spec.make_method(), density) if sized else None
                yield Planned(_file_name("-".join(parts)), spec, " ".join([method, *chosen]), asked)

    def spec(
        self, method: str, seed: int, chosen: Sequence[str] = (), method_options: Mapping[str, Any] | None = None
    ) -> RunSpec:
        """Return a run of one method with what `--set` says of it."""
        kind = None if method == DENSE else _kind(method)
        known = field_names(DataOptions) | field_names(TrainOptions) | (field_names(kind) if kind else set[str]())
        general, own = [], []
        for text in self.assignments:
            key = text.partition("=")[0]
            owner, dot, _ = key.partition(".")
            if owner == "model" or (not dot and key in known):
                general.append(text)
            elif owner == method:
                own.append(text.removeprefix(f"{method}."))
        texts = [*general, *own, *chosen]
        return RunSpec.parse(
            self.model,
            self.data,
            method,
            texts,
            seed=seed,
            epochs=self.epochs,
            method_options=method_options,
            exclude=self.exclude,
            pretrained=self.pretrained,
            checkpoint=self.checkpoint,
        )

    def dense(self, seed: int, epochs: int) -> RunSpec:
        """Return a dense training of that length."""
        spec = self.spec(DENSE, seed)
        return replace(spec, train_options=replace(spec.train_options, epochs=epochs))


def plan_controls(
    comparison: Comparison, runs: Sequence[Planned], known: Mapping[str, FinishedRun], folder: Path
) -> list[Planned]:
    """Return what makes a comparison one at equal cost, for the `known` ones among `runs`.

    For every row a dense training of as many epochs (rounded mean over its runs); for every growth run a network of
    its final density made by `phew`, trained by the final schedule; for every sparse run its masks shuffled within the
    layers, and its masks with other weights, both trained by the final schedule. `folder` holds the folders of `runs`.
    """
    planned: dict[str, Planned] = {}
    lengths = {run.spec.train_options.epochs for run in runs if run.spec.method == DENSE}
    rows: dict[tuple[str, float | None], list[Planned]] = {}
    for run in runs:
        rows.setdefault((run.label, run.asked), []).append(run)
    for members in rows.values():
        epochs = [known[run.name].epochs for run in members if run.name in known]
        mean = round(sum(epochs) / len(epochs)) if epochs else 0
        if mean and mean not in lengths and members[0].spec.method != DENSE:
            lengths.add(mean)
            for seed in comparison.seeds:
                name = f"dense-e{mean}-s{seed}"
                planned[name] = Planned(name, comparison.dense(seed, mean), f"dense, {mean} epochs", None, True)
    for run in runs:
        if run.name in known and known[run.name].density < 1:
            planned |= {control.name: control for control in _controls_of(run, known[run.name].density, folder)}
    return list(planned.values())


def _controls_of(run: Planned, density: float, folder: Path) -> Iterable[Planned]:
    seed = run.spec.train_options.seed
    if isinstance(run.spec.make_method(), Growing):
        spec = replace(run.spec, method="phew", method_options={"density": density, "seed": seed})
        yield Planned(f"phew-of-{run.name}", spec, f"phew as dense as {run.label}", run.asked, True)
    # the artifact is what the run ended with, whatever its last checkpoint holds
    source = str((folder / run.name / "artifact").resolve())
    for kind, shuffle, own in (("shuffled", True, seed), ("fresh", False, seed + _FRESH)):
        options = {"source": source, "shuffle": shuffle, "seed": own}
        train = replace(run.spec.train_options, seed=own)
        weights = run.spec.weights if shuffle else None  # fresh ones are drawn
        spec = replace(run.spec, method="ticket", method_options=options, train_options=train, weights=weights)
        label = f"{run.label}, {'shuffled masks' if shuffle else 'fresh weights'}"
        yield Planned(f"ticket-{kind}-of-{run.name}", spec, label, run.asked, True)


def compare(
    model: str,
    data: str,
    *,
    methods: Sequence[str],
    out: str | Path,
    densities: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    epochs: int | None = None,
    assignments: Sequence[str] = (),
    sweeps: Mapping[str, Sequence[str]] | None = None,
    controls: bool = False,
    exclude: Sequence[str] = (),
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    jobs: int | None = None,
    cluster: Cluster | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a model by several methods, each in a run folder under `out/runs`, and compare the results.

    Every run is a separate process: call this under ``if __name__ == "__main__":``.

    Args:
        model, data: specs as on the command line.
        methods: names, "dense" among the allowed.
        densities: for methods that are given one; methods of whole units read them as budgets of parameters. Without
            any, those run at their default. Others (growth) run once for every seed.
        seeds: one run each.
        epochs: of the (final) training.
        assignments: `KEY=VALUE` goes to every option class that has the key, `METHOD.KEY=VALUE` to the runs of one
            method (its own options, or those of data and training).
        sweeps: `METHOD.KEY` -> texts; the method runs with every one of them.
        controls: add those of `plan_controls`.
        exclude: patterns of names of layers that get no mask, in any run.
        pretrained, checkpoint: start every run from the library's pretrained weights, or from a state dict in a file.
        jobs: runs at the same time; by default one for each core, with one thread each, or 8 on an accelerator; on a
            cluster as many as there is room for.
        cluster: execute the runs there; `out` is on storage that its nodes share. None: on this machine.
        resume: continue in `out`; more methods, densities, seeds and controls may be asked for than before.
        overwrite: replace the comparison in `out`.

    Returns:
        what `compare.json` holds: `runs`, `rows` (means over seeds), `failures` (name of a run -> its error), options,
        versions and hardware.

    Raises:
        ConfigError: options that are not allowed, or that do nothing.
        CheckpointError: `out` cannot be used, or holds a comparison of other options; `checkpoint` does not fit.
        DataError, TraceError: no run could start.
    """
    comparison = Comparison(
        model,
        data,
        tuple(dict.fromkeys(methods)),
        tuple(dict.fromkeys(densities)),
        tuple(dict.fromkeys(seeds)),
        epochs,
        tuple(assignments),
        {key: tuple(dict.fromkeys(values)) for key, values in (sweeps or {}).items()},
        controls,
        tuple(exclude),
        pretrained,
        None if checkpoint is None else Path(checkpoint),
    )
    planned = comparison.runs()
    launch, jobs = _launcher(cluster, jobs, planned[0].spec.train_options.device, Path(out) / "logs")
    heard = list[str]()
    with hearing(heard):
        folder = _open(Path(out), comparison, resume=resume, overwrite=overwrite)
    with closing(folder):
        work = Path(out) / "runs"
        work.mkdir(exist_ok=True)
        with closing(Meter(work, progress, heard)) as meter:
            planned, errors = _train_and_control(comparison, planned, work, launch, meter)
        runs = [_facts_of(run, work, errors.get(run.name)) for run in planned]
        fingerprint = folder.config["data"]["fingerprint"]
        return write_comparison(folder, {**folder.config, "data": data, "fingerprint": fingerprint, "jobs": jobs}, runs)


def _launcher(cluster: Cluster | None, jobs: int | None, device: str, logs: Path) -> tuple[Launch, int | None]:
    """How runs are executed, and how many at the same time (None: as many as a cluster has room for)."""
    if cluster is None:
        count, threads = processes(jobs, device)
        return (lambda runs: run_all(runs, logs, jobs=count, threads=threads)), count
    if jobs is not None and jobs < 1:
        raise ConfigError(f"`--jobs` is {jobs}; allowed are whole numbers from 1 up")
    cluster.connect()
    return (lambda runs: run_all_on(cluster, runs, jobs=jobs)), jobs


def _train_and_control(
    comparison: Comparison, planned: list[Planned], work: Path, launch: Launch, meter: Meter
) -> tuple[list[Planned], dict[str, str]]:
    """Train all runs, then the controls that follow from them; returns all, and the errors of those that failed."""
    errors = dict[str, str]()
    controls = comparison.controls
    _expect(meter, planned)
    if controls:
        expected = {run.name: FinishedRun(_expected_epochs(run.spec), run.asked or 0.5) for run in planned}
        _expect(meter, plan_controls(comparison, planned, expected, work))
    _train_all(planned, work, launch, meter, errors)
    if controls:
        ended = {run.name: finished(work / run.name) for run in planned}
        known = {n: FinishedRun(r["epochs"], r["nnz"] / r["numel"]) for n, r in ended.items() if r is not None}
        more = plan_controls(comparison, planned, known, work)
        meter.keep(run.name for run in [*planned, *more])
        _expect(meter, more)
        _train_all(more, work, launch, meter, errors)
        planned = [*planned, *more]
    return planned, errors


def _facts_of(run: Planned, work: Path, error: str | None) -> dict[str, Any]:
    return run_facts(
        work / run.name,
        label=run.label,
        method=run.spec.method,
        asked=run.asked,
        seed=run.spec.train_options.seed,
        control=run.control,
        error=error,
    )


def _train_all(planned: Sequence[Planned], work: Path, launch: Launch, meter: Meter, errors: dict[str, str]) -> None:
    todo = [(run.name, run.spec, work / run.name) for run in planned if finished(work / run.name) is None]
    controls = {run.name for run in planned if run.control}  # their options are of the runs they are controls of
    with closing(launch(todo)) as reports:
        for report in reports:
            meter.take(report.name, report.epochs, ended=report.ended, failed=report.error is not None)
            for message in report.warnings if report.name not in controls else ():
                meter.warn(report.name, message)
            if report.error is not None:
                errors[report.name] = report.error
                meter.say(f"{report.name} failed: {report.error}")


def _expect(meter: Meter, planned: Iterable[Planned]) -> None:
    for run in planned:
        meter.expect(run.name, f"{run.label} {run.asked}", _expected_epochs(run.spec))
    meter.show()


def _open(out: Path, comparison: Comparison, *, resume: bool, overwrite: bool) -> RunFolder:
    """Open the folder of a comparison, until it is closed, once all is sure that can be known before training."""
    if launched():
        raise ConfigError(
            "a comparison starts its processes itself, one for each run, got several processes that start it together; "
            "start it once, without torchrun, and say by `--jobs` how many runs there are at a time"
        )
    refuse_existing(out, resume=resume, overwrite=overwrite)
    config = {"format": FORMAT, "versions": versions(), **comparison.config()}
    before = RunFolder(out, config).read_json("config.json")
    if before is not None:
        if before.get("format") != FORMAT:
            raise CheckpointError(f"`{out}` is not the folder of a comparison; choose another folder")
        if resume:
            _require_same(out, before, config)
    config["data"] = _try_out(comparison)
    if before is not None and resume:
        _require_same_data(out, before, config)
    folder = RunFolder(out, config)
    out.mkdir(parents=True, exist_ok=True)
    folder.hold()
    try:
        if before is None:
            refuse_existing(out, resume=resume, overwrite=overwrite)  # another process may have begun meanwhile
        if overwrite:
            _clear(out)
        folder.write_json("config.json", config)
    except BaseException:
        folder.close()
        raise
    return folder


def _clear(out: Path) -> None:
    for name in ("runs", "logs"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("table.txt", "compare.json", "accuracy_density.png", "accuracy_cost.png", "accuracy_seconds.png"):
        (out / name).unlink(missing_ok=True)


def _try_out(comparison: Comparison) -> dict[str, Any]:
    """Build what all runs share, and return what tells their data from others; where it fails no run could start."""
    from growfx.commands.job import assemble

    spec = comparison.runs()[0].spec
    with private_randomness():
        source = assemble(
            spec.model,
            spec.data,
            spec.data_options,
            model_kwargs=spec.model_kwargs,
            exclude=spec.exclude,
            weights=spec.weights,
        ).source
    return {"spec": source.spec, "fingerprint": source.fingerprint}


def _require_same_data(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where the runs of a comparison were made of other data; their folder may have moved."""
    old = before.get("data")  # a comparison that began before it was noted has none
    if isinstance(old, Mapping) and old.get("fingerprint") != now["data"]["fingerprint"]:
        raise CheckpointError(
            f"comparison `{out}` was started on `{old.get('spec')}` ({old.get('fingerprint')}), now `--data` is "
            f"`{now['data']['spec']}` ({now['data']['fingerprint']}); continue with the same data, or start a new one "
            "in another folder"
        )


def _require_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless `now` is the comparison `before`, or has more of methods, densities and such."""
    newer = {"exclude": [], "pretrained": False}  # than some comparisons, which had these then
    for key in ("model", "epochs", "set", "methods", "densities", "seeds", "sweep", "controls", *_FROM):
        old, new = before.get(key, newer.get(key)), now[key]
        if key in ("methods", "densities", "seeds") and isinstance(old, list):
            same = set(old) <= set(new)
        elif key == "controls":
            same = bool(new) or not old
        else:
            same = old == new
        if not same:
            raise CheckpointError(
                f"comparison `{out}` was started with `{key}` = {old!r}, now it is {new!r}; continue with the same "
                "options (more methods, densities and seeds are allowed), or start a new one in another folder"
            )


def _kind(method: str) -> type:
    return methods.kind_of(method)


def _takes_density(kind: type) -> bool:
    """Whether a method is told its density, or a budget. Where the default is None, density is an outcome."""
    return getattr(kind, "density", None) is not None or _takes_budget(kind)


def _takes_budget(kind: type) -> bool:
    """Whether a method removes whole units until a budget is met: a density is one of parameters."""
    return "budget" in field_names(kind)


def _sized(kind: type, density: float) -> dict[str, Any]:
    """The option that tells a method its density."""
    return {"budget": f"params={density!r}"} if _takes_budget(kind) else {"density": density}


def _asked(method: Any, density: float | None) -> float | None:
    """The density a method was told, or works at by default; None for a budget of another kind."""
    return density if _takes_budget(type(method)) else getattr(method, "density", None)


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]", "_", text)


def _expected_epochs(spec: RunSpec) -> int:
    """Return how many epochs a run may take; for growth, if no plateau ends it early."""
    method, epochs = spec.make_method(), spec.train_options.epochs
    if not isinstance(method, Growing):
        return epochs
    start = method.seed_density or 0.02
    rounds = math.ceil(math.log(max(method.max_density / start, 1.0)) / math.log(method.growth_ratio)) + 1
    if method.hold_every:  # the last that grows, at `max_density`, is followed by none that is held
        rounds += max(rounds - 2, 0) // method.hold_every
    seed_epochs = method.seed_epochs or (method.epochs_per_round if method.growth_rounds == "published" else epochs)
    return epochs + seed_epochs + (rounds - 1) * method.epochs_per_round
