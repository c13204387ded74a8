"""Time of a stored network on this machine, run in every way there is: dense, masked, compact, sparse, by others.

Every variant's outputs are compared with those of dense torch before it is timed: one that computes something else
gets no time. Variants are timed in turn, so that a machine whose speed drifts does not decide.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from growfx.commands.bench.peers import PEERS, DeepSparse, is_offered, missing_packages, peer_versions
from growfx.commands.bench.report import BenchReport, Measurement, Row
from growfx.commands.bench.subject import opened_subject
from growfx.commands.bench.variants import DENSE, VARIANTS, Built, Setting, VariantBuilder
from growfx.errors import ConfigError, GrowfxError
from growfx.machine import machine_facts, versions
from growfx.passes.trials.precision import largest_error, outputs_of, tolerance_of
from growfx.recorded.inputs import Inputs
from growfx.runtime.choice_cache import ignored_choices
from growfx.runtime.timing import Timing, in_turn, thread_count

__all__ = ["bench"]

_CLOCKS = ("wall", "cpu")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Without a number of rounds, as many as fit into this time.
_SECONDS, _FEWEST, _MOST = 10.0, 5, 100
# Times that a variant may be further from float32 than dense torch in the same lower precision is.
_LOWER_PRECISION = 4.0
_LONGEST = 160  # characters of an error in the table


def bench(
    path: str | Path,
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    dtype: str = "float32",
    repeats: int | None = None,
    variants: Sequence[str] = tuple(VARIANTS),
    progress: bool = False,
    fresh: bool = False,
    clock: str = "wall",
    **options: Any,
) -> BenchReport:
    """Time a network on the CPU, once for every batch size and number of threads.

    `torch.compile` starts afresh for every table, which drops what the process had compiled before.

    Args:
        path: an artifact (also `hf-hub:USER/NAME`), a run folder, or a model's name.
        batches: batch sizes.
        threads: numbers of threads, of torch and the other runtimes alike; default: torch's own.
        dtype: `float32` or `bfloat16`, of weights and inputs.
        repeats: how many times each variant is timed; default: as often as fits into about ten seconds, 5 to 100.
        variants: some of `growfx.commands.bench.variants.VARIANTS`; dense torch always runs. Those whose packages
            are not installed are left out, and named in the report's `missing`.
        progress: show a bar on standard error.
        fresh: time the choices of the sparse runtime anew, and keep them in place of those of earlier runs.
        clock: `wall`, or `cpu`: processor time of all threads together, which hardly depends on what else the machine
            does; comparable between variants that keep one thread busy.
        options: `model`, `example_inputs`, `img_size`, `density`, `model_kwargs` as of
            `growfx.commands.bench.subject.opened_subject`.

    Raises:
        ConfigError: an option is out of its range, or the network does not run on such inputs.
        ArtifactError, CheckpointError, DataError: no network at the path, or a damaged one.
    """
    _check(batches, threads, repeats, dtype, variants, clock)
    chosen = [name for name in VARIANTS if name == DENSE or (name in variants and is_offered(name))]
    missing = {name: needs for name in chosen if (needs := missing_packages(name))}
    names = [name for name in chosen if name not in missing]
    kinds = [(batch, count) for batch in batches for count in threads or (torch.get_num_threads(),)]
    bar = tqdm(total=len(kinds) * (len(names) + 1), desc="bench", disable=not progress, file=sys.stderr, leave=False)
    with (
        opened_subject(path, **options) as subject,
        tempfile.TemporaryDirectory() as folder,
        bar,
        ignored_choices(fresh),
    ):
        work = VariantBuilder(subject, _DTYPES[dtype], Path(folder))
        found = [_measured(work, names, repeats, kind, clock, bar) for kind in kinds]
        shapes = tuple(tuple(x.shape[1:]) for x in subject.example.args if isinstance(x, Tensor))
        info = subject.info
        return BenchReport(
            path=subject.given,
            kind=subject.kind,
            model=subject.name,
            density=info.density,
            nnz=info.nnz,
            numel=info.numel,
            dtype=dtype,
            inputs=shapes,
            measurements=tuple(found),
            clock=clock,
            machine=machine_facts(),
            versions=versions() | peer_versions(),
            missing=missing,
        )


def _check(
    batches: Sequence[int],
    threads: Sequence[int],
    repeats: int | None,
    dtype: str,
    variants: Sequence[str],
    clock: str,
) -> None:
    counts = {"batches": batches, "threads": threads, "repeats": [] if repeats is None else [repeats]}
    for name, values in counts.items():
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"`{name}` has `{value}`; allowed: whole numbers from 1 on")
    if not batches:
        raise ConfigError("`batches` is empty; give at least one batch size")
    if dtype not in _DTYPES:
        raise ConfigError(f"`dtype` = `{dtype}` cannot be measured; allowed: {_names(_DTYPES)}")
    if clock not in _CLOCKS:
        raise ConfigError(f"`clock` = `{clock}` is unknown; allowed: {_names(_CLOCKS)}")
    for name in variants:
        if name not in VARIANTS:
            raise ConfigError(f"variant `{name}` is unknown; allowed: {_names(VARIANTS)}")


def _names(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _measured(
    work: VariantBuilder,
    names: Sequence[str],
    repeats: int | None,
    kind: tuple[int, int],
    clock: str,
    bar: Any,
) -> Measurement:
    """All variants at one batch size and number of threads."""
    batch, threads = kind
    setting = Setting(work.subject.inputs(batch, work.dtype), batch, threads)
    with thread_count(threads):
        expected, tolerance, spent = _reference(work, setting)
        built: dict[str, Built] = {}
        rows: dict[str, Row] = {}
        for name in names:
            bar.set_description(f"bench: batch {batch}, threads {threads}: {name}")
            rows[name] = _tried(work, setting, name, expected, tolerance, built)
            bar.update()
        bar.set_description(f"bench: batch {batch}, threads {threads}: timing")
        # A round runs each variant twice, and few are slower than dense torch.
        rounds = repeats or max(_FEWEST, min(_MOST, int(_SECONDS / (2 * len(built) * spent))))
        args, kwargs = setting.inputs.args, setting.inputs.kwargs
        calls = {name: (lambda module=way.module: module(*args, **kwargs)) for name, way in built.items()}
        with torch.inference_mode():
            timings, errors = in_turn(calls, rounds, clock=_clock(clock, built))
        bar.update()
    for name, error in errors.items():
        rows[name] = Row(name, note=_reason(error))
    best = _best_peer(timings)
    for name in timings:
        rows[name] = _timed(rows[name], timings, best)
    lowering = next((way.lowering for way in built.values() if way.lowering is not None), None)
    return Measurement(batch, threads, rounds, tuple(rows.values()), lowering, best)


def _clock(name: str, built: Mapping[str, Built]) -> Callable[[], float]:
    """What to time by; processor time is that of this process and of those that work for it."""
    if name == "wall":
        return time.perf_counter
    workers = [way.module for way in built.values() if isinstance(way.module, DeepSparse)]
    return lambda: time.process_time() + sum(worker.processor_seconds() for worker in workers)


def _best_peer(timings: Mapping[str, Timing]) -> str | None:
    """The fastest of those that ran the dense network in float32 elsewhere; None where none did."""
    yardsticks = [name for name in timings if name in PEERS and PEERS[name].is_yardstick]
    return min(yardsticks, key=lambda name: timings[name].median, default=None)


def _timed(row: Row, timings: Mapping[str, Timing], best: str | None) -> Row:
    timing = timings[row.variant]
    return replace(
        row,
        minimum=timing.minimum,
        median=timing.median,
        speedup=timing.speedup_over(timings[DENSE]) if DENSE in timings else None,
        over_peer=None if best is None else timing.speedup_over(timings[best]),
    )


def _reference(work: VariantBuilder, setting: Setting) -> tuple[list[Tensor], float, float]:
    """The outputs to compare with, how far others may be from them, and about how long dense torch takes."""
    try:
        own = _outputs(work.dense(), setting.inputs)
        start = time.perf_counter()
        _outputs(work.dense(), setting.inputs)
        spent = time.perf_counter() - start
    except GrowfxError:
        raise
    except Exception as error:
        shapes = ", ".join("x".join(map(str, x.shape)) for x in setting.inputs.args if isinstance(x, Tensor))
        raise ConfigError(f"the network does not run on inputs of {shapes} ({_reason(error)})") from error
    if work.dtype is torch.float32:
        return own, tolerance_of(torch.float32), spent
    exact = work.once("float32", lambda: work.subject.load(dtype=torch.float32))
    widened = lambda v: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    wide = pytree.tree_map(widened, (setting.inputs.args, dict(setting.inputs.kwargs)))
    expected = _outputs(exact, Inputs(*wide))
    return expected, max(tolerance_of(work.dtype), _LOWER_PRECISION * largest_error(own, expected)), spent


def _tried(
    work: VariantBuilder, setting: Setting, name: str, expected: list[Tensor], tolerance: float, built: dict[str, Built]
) -> Row:
    """Build a variant and compare its outputs; it joins `built` when it may be timed."""
    try:
        way = VARIANTS[name](work, setting)
        error = largest_error(_outputs(way.module, setting.inputs), expected)
    except Exception as problem:  # of any library: one that fails must not end the others
        return Row(name, note=_reason(problem))
    if way.is_lower_precision:
        tolerance = max(tolerance, _bfloat16_tolerance(work, setting, expected))
    if not error <= tolerance:
        return Row(name, error=error, note=f"its outputs differ by {error:.2g} of the largest; not timed")
    built[name] = way
    return Row(name, weight_bytes=way.weight_bytes, error=error, note=way.note)


def _bfloat16_tolerance(work: VariantBuilder, setting: Setting, expected: list[Tensor]) -> float:
    """How far outputs computed in bfloat16 may be from those in float32: a multiple of how far torch's are."""
    dense = work.once("bfloat16", lambda: work.subject.load(dtype=torch.bfloat16))
    own = _outputs(dense, work.subject.inputs(setting.batch, torch.bfloat16))
    return max(tolerance_of(torch.bfloat16), _LOWER_PRECISION * largest_error(own, expected))


def _outputs(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    # Only calls run in inference mode: what is loaded or exported in it could not be compiled or cast later.
    with torch.inference_mode():
        return outputs_of(module, inputs)


def _reason(error: Exception) -> str:
    """One short line."""
    lines = (line.strip() for line in str(error).splitlines())
    text = next((line for line in lines if line), "")
    text = text if isinstance(error, GrowfxError) else f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
