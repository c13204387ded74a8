"""Write the report of runs as one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from growfx.errors import ConfigError
from growfx.file_paths import as_path
from growfx.notices import warn_once
from growfx.reporting.html.comparison import comparison_parts, data_note
from growfx.reporting.html.elements import Markup, tag
from growfx.reporting.html.page import page
from growfx.reporting.html.record import RunRecord, find_runs, read_run
from growfx.reporting.html.single import run_parts
from growfx.version import __version__

__all__ = ["ReportFile", "report"]

_DOOR: Final = "growfx.report"
_BEGINNING: Final = b"<!doctype html"


@dataclass(frozen=True)
class ReportFile:
    """What `growfx.report` wrote.

    Attributes:
        path: the HTML file, of `bytes` bytes.
        runs: the run folders it is about.
        notes: what it could not show of them, and whether their data differ; also sent as `GrowfxWarning`.
    """

    path: Path
    bytes: int
    runs: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        of = "1 run" if len(self.runs) == 1 else f"{len(self.runs)} runs"
        return f"{self.path}: {of}, {self.bytes:,} bytes"


def report(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> ReportFile:
    """Write one self-contained HTML file about one or several runs: charts, tables, nothing loaded from elsewhere.

    One run: growth curve with fits and stop, edges by birth, density of each layer by round, learning curves, path mass
    and dead units of each layer, cost, kernels, the artifact, all options. Several: accuracy over density, FLOPs and
    seconds, a table that can be sorted, and then each run.

    A run is read as far as it goes: one that has not ended, or is damaged, is shown with what it has, and the page says
    what is missing. Path mass and units need the model; where it cannot be built here the page says why. The report of
    several runs leaves them out.

    Args:
        paths: a run folder, the folder of a comparison (all its runs), or several of these.
        out: the file to write; folders above it are made.
        overwrite: replace a report (or another HTML file) at `out`.

    Raises:
        ConfigError: a path is not a run or a comparison, there is none, or `out` exists or cannot be written.

    >>> data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.arange(8) % 2)
    >>> loader = torch.utils.data.DataLoader(data, batch_size=4)
    >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4))
    >>> method = growfx.methods.create("static", density=0.5)
    >>> result = growfx.train(net, loader, loader, method=method, epochs=1, out="run", progress=False)
    >>> growfx.report("run", "report.html").runs[0].name
    'run'
    """
    target = _checked_target(as_path(out, _DOOR, ConfigError), overwrite=overwrite)
    folders = find_runs(_as_paths(paths))
    runs = [read_run(folder) for folder in folders]
    names = _names(runs)
    if len(runs) == 1:
        title, parts = f"{names[0]}: {runs[0].model}, {runs[0].method}", run_parts(runs[0], with_paths=True)
    else:
        title, parts = f"{len(runs)} runs side by side", _several(runs, names)
    about = tag("p", f"growfx {__version__}", class_="soft")
    content = page(title, [tag("h1", title), about, *parts]).encode("utf-8", errors="replace")
    _write(target, content)
    notes: list[str] = []
    for note in _notes(runs, names):
        warn_once(note, notes)
    return ReportFile(target, len(content), tuple(folders), tuple(notes))


def _as_paths(paths: Any) -> list[Path]:
    several = isinstance(paths, Iterable) and not isinstance(paths, (str, bytes, os.PathLike))
    found = [as_path(path, _DOOR, ConfigError) for path in (paths if several else [paths])]
    if not found:
        raise ConfigError(f"{_DOOR} expects the folder of a run or of a comparison, got none")
    return found


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Return the folders' names, or their paths where names are not enough to tell them apart."""
    names = [run.name for run in runs]
    return [str(run.path) if names.count(run.name) > 1 else run.name for run in runs]


def _several(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Markup]:
    parts = comparison_parts(runs, names)
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        content = run_parts(run, with_paths=False)
        parts.append(tag("details", tag("summary", f"{name}: {run.model}, {run.method}"), *content, id=f"run-{place}"))
    return parts


def _notes(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    notes = [f"run `{name}`: {'; '.join(run.problems)}" for run, name in zip(runs, names, strict=True) if run.problems]
    different = data_note(runs, names)
    return [*notes, *([different] if different else [])]


def _checked_target(out: Path, *, overwrite: bool) -> Path:
    """Return `out` if a report may be written there."""
    try:
        if out.is_dir():
            raise ConfigError(
                f"`{out}` is a folder; give the name of the HTML file to write, as `{out / 'report.html'}`"
            )
        if not out.exists():
            return out
        if not overwrite:
            raise ConfigError(
                f"`{out}` exists; replace it with `--overwrite` (in Python `overwrite=True`), or choose another file"
            )
        with out.open("rb") as stream:
            beginning = stream.read(len(_BEGINNING))
    except (OSError, ValueError) as error:
        raise ConfigError(f"`{out}` cannot be used ({getattr(error, 'strerror', None) or error})") from error
    if beginning.lower() not in (_BEGINNING, b""):
        raise ConfigError(f"`{out}` is not an HTML file, so a report does not replace it; choose another file")
    return out


def _write(out: Path, content: bytes) -> None:
    """Write the file, whole or not at all."""
    new = out.with_name(out.name + ".new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)
        new.replace(out)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise ConfigError(f"`{out}` cannot be written ({error.strerror}); choose another file") from error
