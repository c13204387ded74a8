"""Execute runs on a Ray cluster: one task for each, in the folders of the comparison, which all nodes share.

A task continues its run from the last checkpoint. So a node that dies costs what it did since then.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

from growfx.commands.compare.pool import PRELOAD, Report, RunSpec
from growfx.commands.compare.progress import LogTail, finished
from growfx.commands.ray_cluster import Cluster, Outcome
from growfx.errors import GrowfxError, one_line
from growfx.notices import hearing

__all__ = ["run_all_on"]


def run_all_on(
    cluster: Cluster, runs: Sequence[tuple[str, RunSpec, Path]], *, jobs: int | None = None
) -> Generator[Report]:
    """Continue or start runs, as many at a time as the cluster has room for; reports as `pool.run_all` does.

    Args:
        cluster: connected.
        runs: name, options and folder of each; the folders are on storage that all nodes share.
        jobs: at most so many at the same time.
    """
    remotes = {name: _Remote(name, out.resolve()) for name, _, out in runs}
    tasks = {name: (spec, str(out.resolve()), cluster.cpus) for name, spec, out in runs}
    with closing(cluster.execute(_run_on_node, tasks, jobs=jobs)) as looks:
        for look in looks:
            for name in [*look.ended, *look.running]:
                report = remotes[name].look(look.ended.get(name))
                if report is not None:
                    yield report


class _Remote:
    """A run on some node, as far as the shared folder tells of it."""

    def __init__(self, name: str, out: Path) -> None:
        self.name, self.out = name, out
        self.epochs, self._tail = 0, LogTail(out)

    def look(self, outcome: Outcome | None) -> Report | None:
        """Return what is new, None when nothing is; the value of an `outcome` is what `_run_on_node` returned."""
        before, self.epochs = self.epochs, self._tail.epochs()
        if outcome is None:
            return Report(self.name, self.epochs, ended=False) if self.epochs != before else None
        raised, warnings = outcome.value or (None, ())
        error = outcome.error or raised
        if error is None and finished(self.out) is None:
            error = f"the run has ended on its node, but `{self.out}` has no result; all nodes must share that folder"
        return Report(self.name, self.epochs, ended=True, error=error, warnings=tuple(warnings))


def _run_on_node(spec: RunSpec, out: str, threads: int) -> tuple[str | None, list[str]]:
    """What a task does: one run; returns its error, None when there is none, and what it warned of."""
    for name in PRELOAD:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(threads)
    heard = list[str]()
    try:
        with hearing(heard):
            spec.run(Path(out), resume=True, progress=False)
    except GrowfxError as error:
        return one_line(error), heard
    except Exception as error:  # of a library, or a fault of ours: the other runs go on
        return one_line(error)[:300], heard
    return None, heard
