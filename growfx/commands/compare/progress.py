"""How far the runs of a comparison are, told by their folders, and one bar over all of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from growfx.notices import warn_once
from growfx.runs.folder import RunFolder

__all__ = ["LogTail", "Meter", "epochs_logged", "finished"]


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a run that is over, None where there is none."""
    return RunFolder(folder, {}).read_json("result.json")


def epochs_logged(folder: Path) -> int:
    """How many epochs the log of a run tells of, all stages together; 0 without one."""
    return LogTail(folder).epochs()


class LogTail:
    """The log of a run that goes on: each look reads what was written since the last one."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "log.jsonl"
        self._position = self._epochs = 0

    def epochs(self) -> int:
        """How many epochs the log tells of by now."""
        try:
            with self._path.open("rb") as stream:
                if os.fstat(stream.fileno()).st_size < self._position:  # the run was set back to its last checkpoint
                    self._position = self._epochs = 0
                stream.seek(self._position)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break  # being written; the next look takes it
                    self._position += len(line)
                    self._take(line)
        except FileNotFoundError:
            self._position = self._epochs = 0
        return self._epochs

    def _take(self, line: bytes) -> None:
        with suppress(ValueError):  # torn, by a run that was killed
            record = json.loads(line)
            if record["event"] == "epoch":
                self._epochs = record["epoch"]


class Meter:
    """One bar over the epochs of all runs in `work`. What a run takes is known when another of its row has ended.

    `heard`: messages that were warned of already.
    """

    def __init__(self, work: Path, shown: bool, heard: Iterable[str] = ()) -> None:
        self.work, self.heard = work, set(heard)
        self.rows: dict[str, str] = {}
        self.expected: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.ended: set[str] = set()
        self.failed = self.initial = 0
        self.bar = tqdm(total=0, desc="compare", unit="epoch", disable=not shown)

    def expect(self, name: str, row: str, epochs: int) -> None:
        """Count a run in, with what earlier processes did of it."""
        if name not in self.expected:
            done = epochs_logged(self.work / name)
            self.initial += done
            self.rows[name], self.expected[name], self.done[name] = row, epochs, done
            if finished(self.work / name) is not None:
                self._learn(name)

    def keep(self, names: Iterable[str]) -> None:
        """Forget the runs that were expected and are not among these."""
        for name in self.expected.keys() - set(names):
            del self.rows[name], self.expected[name], self.done[name]
            self.ended.discard(name)

    def take(self, name: str, epochs: int, *, ended: bool, failed: bool) -> None:
        """Show what is new of a run."""
        self.done[name] = epochs
        self.failed += failed
        if ended:
            self._learn(name)
        self.show()

    def say(self, text: str) -> None:
        """Print one line above the bar; always, because it is about a failure."""
        tqdm.write(text, file=sys.stderr)

    def warn(self, name: str, message: str) -> None:
        """Pass on what a run warned of, unless another run did before."""
        if message not in self.heard:
            self.heard.add(message)
            with tqdm.external_write_mode(file=sys.stderr):
                warn_once(f"run `{name}`: {message}", [])

    def close(self) -> None:
        """Keep the bar."""
        self.bar.close()

    def _learn(self, name: str) -> None:
        self.ended.add(name)
        self.expected[name] = self.done[name]
        for other in self.expected.keys() - self.ended:
            if self.rows[other] == self.rows[name]:
                self.expected[other] = self.done[name]

    @property
    def total(self) -> int:
        """Epochs of all runs, as far as is known."""
        return sum(max(epochs, self.done[name]) for name, epochs in self.expected.items())

    def show(self) -> None:
        """Draw the bar."""
        if self.bar.disable:
            return
        self.bar.initial, self.bar.total, self.bar.n = self.initial, self.total, sum(self.done.values())
        state = f"{len(self.ended)}/{len(self.expected)} runs{f', {self.failed} failed' if self.failed else ''}"
        self.bar.set_postfix_str(state, refresh=False)
        self.bar.refresh()
