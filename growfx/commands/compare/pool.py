"""Execute runs, one after another or in parallel worker processes."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growfx import methods
from growfx.commands.children import end_with_parent, fork_context
from growfx.commands.compare.progress import LogTail
from growfx.commands.methods import DENSE
from growfx.commands.starting_weights import StartingWeights, split_arguments
from growfx.errors import ConfigError, GrowfxError, one_line
from growfx.methods.base import Method
from growfx.notices import hearing
from growfx.options import DataOptions, TrainOptions, parse_assignments
from growfx.runs.folder import refuse_existing
from growfx.training.recipe import pick_device

if TYPE_CHECKING:
    from growfx.runs.result import Result

__all__ = ["PRELOAD", "Report", "RunSpec", "field_names", "processes", "run_all"]

_ACCELERATOR_JOBS = 8  # small networks leave most of an accelerator idle
_PATIENCE = 10.0  # seconds
_POLL = 0.5  # seconds between looks at what the runs have logged
PRELOAD = [
    "torch",
    "timm",
    "torchvision",
    "growfx.training.start",
    "growfx.artifact.writer",
    "growfx.commands.job",
    "growfx.commands.compare.pool",
]


@dataclass(frozen=True)
class RunSpec:
    """All that a run is made of: what `growfx grow` and `growfx train` are told.

    Attributes:
        model, data: specs as on the command line.
        method: a name that `growfx.methods.create` knows, or "dense".
        method_options, model_kwargs: by name.
        exclude: patterns of names of layers that get no mask.
        weights: where the initial weights come from; None: drawn from the seed.
    """

    model: str
    data: str
    method: str
    method_options: Mapping[str, Any]
    model_kwargs: Mapping[str, Any]
    data_options: DataOptions
    train_options: TrainOptions
    exclude: tuple[str, ...] = ()
    weights: StartingWeights | None = None

    @classmethod
    def parse(
        cls,
        model: str,
        data: str,
        method: str,
        assignments: Iterable[str] = (),
        *,
        seed: int = 0,
        epochs: int | None = None,
        method_options: Mapping[str, Any] | None = None,
        exclude: Iterable[str] = (),
        pretrained: bool = False,
        checkpoint: Path | None = None,
    ) -> RunSpec:
        """Sort `key=value` texts into the options that have the key; they go before the other arguments.

        `seed` is that of the training and of the method, `pretrained` and `checkpoint` say where weights come from.
        Raises `ConfigError` for an unknown method or key, and for values that are not allowed.
        """
        kinds: dict[str, type] = {"data": DataOptions, "train": TrainOptions}
        own: dict[str, Any] = {}
        if method != DENSE:
            kinds["method"] = methods.kind_of(method)
            own = {"seed": seed} if "seed" in field_names(kinds["method"]) else {}
        values = parse_assignments(assignments, kinds)
        weights, shaping = split_arguments(model, values["model"], pretrained=pretrained, checkpoint=checkpoint)
        given: dict[str, Any] = {"seed": seed} if epochs is None else {"seed": seed, "epochs": epochs}
        spec = cls(
            model,
            data,
            method,
            {**own, **(method_options or {}), **values.get("method", {})},
            shaping,
            DataOptions(**values["data"]),
            TrainOptions(**{**given, **values["train"]}),
            tuple(exclude),
            weights,
        )
        spec.make_method()
        return spec

    def make_method(self) -> Method | None:
        """Return the method, not attached; None for a dense training."""
        return None if self.method == DENSE else methods.create(self.method, **self.method_options)

    def run(self, out: Path, *, resume: bool = False, overwrite: bool = False, progress: bool = True) -> Result:
        """Train; everything is kept in the run folder `out`. Raises as `growfx.train`, `assemble` and `RunFolder`."""
        from growfx.commands.job import assemble
        from growfx.distributed import ranks
        from growfx.training.start import train

        ranks.on_first(lambda: refuse_existing(out, resume=resume, overwrite=overwrite))
        options = self.train_options
        job = assemble(
            self.model,
            self.data,
            self.data_options,
            model_kwargs=self.model_kwargs,
            seed=options.seed,
            exclude=self.exclude,
            weights=self.weights,
        )
        return train(
            job.net,
            job.loader("train", train=True),
            job.loader("val"),
            method=self.make_method(),
            test_loader=job.loader("test") if "test" in job.source.splits else None,
            options=options,
            out=out,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            about=job.about(),
        )


def field_names(kind: type) -> set[str]:
    """Names of the options of a dataclass."""
    return {f.name for f in dataclasses.fields(kind) if f.init}


# -- many at a time -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What is known of a run: epochs trained so far; whether it has ended, and by which error (None: as it should).

    `warnings`: of one that has ended, the texts of its `GrowfxWarning`s.
    """

    name: str
    epochs: int
    ended: bool
    error: str | None = None
    warnings: tuple[str, ...] = ()


def run_all(runs: Sequence[tuple[str, RunSpec, Path]], logs: Path, *, jobs: int, threads: int = 1) -> Generator[Report]:
    """Continue or start runs, `jobs` of them at the same time; yields a report whenever one has moved on.

    A run that fails, or whose process dies, is reported and does not stop the others. Closing the generator ends all
    processes; what their last checkpoints hold is kept.

    Args:
        runs: name, options and folder of each.
        logs: where a failed run leaves `<name>.log` with what it had to say.
        jobs: processes. threads: of each.
    """
    waiting, running = list(runs)[::-1], list[_Child]()
    context = fork_context(PRELOAD)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Child(context, *waiting.pop(), logs, threads))
            connection.wait([child.results for child in running], _POLL)
            for child in list(running):
                report = child.look()
                if report is not None:
                    if report.ended:
                        running.remove(child)
                    yield report
    finally:
        for child in running:
            child.process.terminate()
        for child in running:
            child.close()
        with suppress(OSError):
            logs.rmdir()  # unless a run left something


def processes(jobs: int | None, device: str) -> tuple[int, int]:
    """Return how many runs go on at the same time, and with how many threads each."""
    if jobs is not None and jobs < 1:
        raise ConfigError(f"`--jobs` is {jobs}; allowed are whole numbers from 1 up")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if pick_device(device).type == "cpu":
        return jobs or cores, 1
    jobs = jobs or _ACCELERATOR_JOBS
    return jobs, max(1, cores // jobs)


class _Child:
    """A run in a separate process."""

    def __init__(self, context: Any, name: str, spec: RunSpec, out: Path, logs: Path, threads: int) -> None:
        self.name, self.out, self.log = name, out, logs / f"{name}.log"
        self.epochs, self._tail = 0, LogTail(out)
        logs.mkdir(parents=True, exist_ok=True)
        self.results, sender = context.Pipe(duplex=False)
        listener, self._lifeline = context.Pipe(duplex=False)
        # No daemon: those may not have the loading processes that `workers` asks for.
        self.process = context.Process(target=_run_in_child, args=(spec, out, self.log, sender, listener, threads))
        self.process.start()
        sender.close()
        listener.close()

    def look(self) -> Report | None:
        """Return what is new, None when nothing is."""
        ended, error, warnings = False, None, ()
        try:
            if self.results.poll():
                error, warnings = json.loads(self.results.recv_bytes())
                ended = True
        except (EOFError, OSError):
            ended, error = True, self._cause()
        moved = self._read_log()
        if ended:
            self.close()
            if error is None:
                self.log.unlink(missing_ok=True)
        return Report(self.name, self.epochs, ended, error, tuple(warnings)) if ended or moved else None

    def close(self) -> None:
        """Wait a moment for the process to put its things away, then end it: files are written whole or not at all."""
        self.process.join(_PATIENCE)
        self.process.kill()
        self.process.join()
        self.process.close()
        self.results.close()
        self._lifeline.close()

    def _read_log(self) -> bool:
        """Take the epochs trained from the end of the run's log; returns whether there are others than before."""
        before, self.epochs = self.epochs, self._tail.epochs()
        return self.epochs != before

    def _cause(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"the process ended with status {code}; see `{self.log}`"
        name = signal.Signals(-code).name
        return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def _run_in_child(spec: RunSpec, out: Path, log: Path, results: Any, lifeline: Any, threads: int) -> None:
    """What a process does: one run, and send its error (None when there is none) and what it warned of."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, for all
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    end_with_parent(lifeline)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    import torch

    gc.freeze()  # the libraries stay: no collection need look at them, or copy their pages
    torch.set_num_threads(threads)
    error, heard = None, list[str]()
    try:
        with hearing(heard):
            spec.run(out, resume=True, progress=False)
    except GrowfxError as problem:
        error = one_line(problem)
    except Exception as problem:  # of a library, or a fault of ours: the other runs go on
        traceback.print_exc()
        error = f"{one_line(problem)[:300]}; see `{log}`"
    sys.stderr.flush()
    results.send_bytes(json.dumps([error, heard]).encode())
