"""Coverage of the model zoo: every architecture checked, the results kept in a file that a later run continues."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from growfx.commands.ray_cluster import Cluster
from growfx.commands.zoo.cluster import check_all_on
from growfx.commands.zoo.facts import CUT_SHORT, REAL_BELOW, Facts
from growfx.commands.zoo.pool import Limits, check_all
from growfx.commands.zoo.table import census
from growfx.errors import ConfigError
from growfx.version import __version__

__all__ = ["Results", "check_zoo"]

_FORMATS = "growfx zoo "
_FORMAT = f"{_FORMATS}2"
_SAVE_EVERY = 5.0  # seconds


class Results:
    """Facts by model, in a JSON file or (`file` None) in memory alone.

    The file holds `format`, `versions`, `census` (operator -> number of models) and `models` (see `Facts`), one line a
    model in order of names.

    Args:
        file: where to keep them.
        overwrite: start anew what other versions have written.
        packages: name -> version of further packages that the results depend on.

    Raises:
        ConfigError: the file is none of ours, or of other versions (without `overwrite`).
    """

    def __init__(self, file: Path | None, *, overwrite: bool = False, packages: Mapping[str, str] | None = None):
        self.file, self.facts = file, dict[str, Facts]()
        self.versions = {**versions(), **(packages or {})}
        self._saved_at = 0.0
        if file is None or not file.exists():
            if file is not None and not file.absolute().parent.is_dir():
                raise ConfigError(f"`{file}` cannot be written: there is no folder `{file.absolute().parent}`")
            return
        content = _read(file)
        if content["format"] == _FORMAT and content["versions"] == self.versions:
            self.facts = {values["model"]: Facts.from_json(values) for values in content["models"]}
        elif not overwrite:
            raise ConfigError(
                f"`{file}` is of other versions ({_told_apart(content, self.versions)}); "
                "give another file, or --overwrite to start it anew"
            )

    def missing(self, specs: Sequence[str], real_below: float = REAL_BELOW) -> list[str]:
        """Those that were not checked yet, were cut short from outside, or were checked without values wanted now."""
        known = {name: facts for name, facts in self.facts.items() if facts.ended not in CUT_SHORT}
        return [s for s in specs if s not in known or (known[s].device == "meta" and known[s].parameters < real_below)]

    def add(self, facts: Facts) -> None:
        """Keep the facts of one model; the file is written every few seconds."""
        self.facts[facts.model] = facts
        if time.monotonic() - self._saved_at > _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self._saved_at = time.monotonic()
        if self.file is None:
            return
        lines = [json.dumps(dataclasses.asdict(self.facts[name])) for name in sorted(self.facts)]
        head = {"format": _FORMAT, "versions": self.versions, "census": census(self.facts.values())}
        text = json.dumps(head, indent=1)[:-2] + ',\n "models": [\n' + ",\n".join(lines) + "\n ]\n}\n"
        stage = self.file.with_name(f".{self.file.name}.{os.getpid()}.tmp")
        try:
            stage.write_text(text, encoding="utf-8")
            stage.replace(self.file)
        except OSError as error:
            stage.unlink(missing_ok=True)
            raise ConfigError(f"`{self.file}` cannot be written ({error.strerror})") from error


def check_zoo(
    specs: Sequence[str],
    results: Results,
    limits: Limits | None = None,
    *,
    real_below: float = REAL_BELOW,
    again: bool = False,
    progress: bool = True,
    cluster: Cluster | None = None,
) -> list[Facts]:
    """Check the models that `results` lacks (`again`: all of them) and return the facts of all.

    Interrupted (Ctrl-C), what was done by then is in `results` and its file.

    Args:
        cluster: check them there, each within `limits` on its node; None: on this machine.
    """
    todo = list(specs) if again else results.missing(specs, real_below)
    # Families come in blocks of like size; mixed, the remaining time can be told from the time spent.
    random.Random(0).shuffle(todo)
    failed, limits = 0, limits or Limits()
    if cluster is None or not todo:
        rows = check_all(todo, limits, real_below)
    else:
        cluster.connect()
        rows = check_all_on(cluster, todo, limits, results.versions, real_below)
    bar = tqdm(total=len(specs), initial=len(specs) - len(todo), desc="zoo", unit="model", disable=not progress)
    with contextlib.closing(rows) as checked, bar:
        try:
            for facts in checked:
                results.add(facts)
                failed += bool(facts.problems)
                bar.set_postfix_str(f"{failed} with exceptions, last {facts.model}", refresh=False)
                bar.update()
        finally:
            results.save()
    return [results.facts[spec] for spec in specs]


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    others = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm")}
    return {"growfx": __version__, **others}


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"].startswith(_FORMATS):
            return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"`{file}` holds no results of `growfx zoo` ({type(error).__name__})") from error
    raise ConfigError(f"`{file}` holds results in another format ({content['format']!r}); this is {_FORMAT!r}")


def _told_apart(content: Mapping[str, Any], installed: Mapping[str, str]) -> str:
    """What of a file is not as it would be now."""
    there = content["versions"]
    names = [name for name in {**there, **installed} if there.get(name) != installed.get(name)]
    parts = [f"{name} {there.get(name, 'missing')}, installed: {installed.get(name, 'missing')}" for name in names]
    return "; ".join(parts or [f"{content['format']!r}, this is {_FORMAT!r}"])
