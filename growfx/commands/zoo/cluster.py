"""Check models on a Ray cluster: one task for each, in a process that has the limits of the check.

A task whose node dies begins anew on another one.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import socket
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from typing import Any

from growfx.commands.ray_cluster import Cluster
from growfx.commands.zoo.facts import REAL_BELOW, Facts
from growfx.commands.zoo.guests import go_offline, is_guest
from growfx.commands.zoo.pool import Limits, check_all
from growfx.version import __version__

__all__ = ["check_all_on"]


def check_all_on(
    cluster: Cluster,
    specs: Iterable[str],
    limits: Limits,
    versions: Mapping[str, str],
    real_below: float = REAL_BELOW,
) -> Generator[Facts]:
    """Check every model, as many at once as the cluster has room for; yields their facts as `pool.check_all` does.

    A model that the cluster loses, or whose node has other versions than `versions`, ends as "crash".

    Args:
        cluster: connected.
        limits: of each check, on its node; `jobs`: at most so many at the same time.
        versions: distribution -> version that the results are of.
    """
    limits = dataclasses.replace(limits, threads=cluster.cpus)
    tasks = {spec: (spec, limits, real_below, dict(versions)) for spec in specs}
    with closing(cluster.execute(_check_on_node, tasks, jobs=limits.jobs)) as looks:
        for look in looks:
            for spec, outcome in look.ended.items():
                if outcome.error is None:
                    yield Facts.from_json(outcome.value)
                else:
                    yield Facts(spec, stage="start", ended="crash", cause=outcome.error)


def _check_on_node(spec: str, limits: Limits, real_below: float, versions: Mapping[str, str]) -> dict[str, Any]:
    """What a task does: one model; returns its facts as JSON values."""
    there = {name: _installed(name) for name in versions}
    if there != versions:
        different = ", ".join(
            f"{name} {there[name]}, here {versions[name]}" for name in versions if there[name] != versions[name]
        )
        cause = f"the node `{socket.gethostname()}` has other versions: {different}"
        return dataclasses.asdict(Facts(spec, stage="start", ended="crash", cause=cause))
    if is_guest(spec):
        go_offline()
    with closing(check_all([spec], dataclasses.replace(limits, jobs=1), real_below)) as checked:
        return dataclasses.asdict(next(checked))


def _installed(distribution: str) -> str:
    if distribution == "growfx":
        return __version__
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
