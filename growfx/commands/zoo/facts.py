"""What `growfx zoo` knows of one model, and how it is said."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["CHECKS", "CUT_SHORT", "REAL_BELOW", "Facts", "one_line", "scrubbed"]

# In the order in which they are made. Verdicts are texts: "yes", "no: why", or "n/a: why".
CHECKS = (
    "recorded",
    "untouched",
    "graph eval",
    "graph train",
    "weights found",
    "path rules",
    "eval",
    "batch 3",
    "train",
    "other size",
    "gradients",
    "extreme paths",
    "paths",
    "growth",
    "artifact",
    "native",
)
# How a check can end from outside; such models are checked again when a run continues.
REAL_BELOW = 60_000_000  # parameters; larger models are checked without values, on the meta device
CUT_SHORT = ("timeout", "memory", "crash")
_LONGEST = 400


@dataclasses.dataclass
class Facts:
    """What is known of one model; JSON values only.

    Attributes:
        model: as `growfx.create_model` takes it, or `guests/PACKAGE/MODEL`; `arguments`: keyword arguments it was built
            with.
        library: "timm", "torchvision", "guests" or "python"; `family`: the module that defines the model, of guests
            their package.
        parameters: how many numbers are learned.
        device: "real", or "meta" for models checked without values.
        input: shapes of the example inputs at batch 1; `other_input`: of those of another height and width.
        checks: name of a check (`CHECKS`) -> verdict; one that was not reached is missing.
        layers: numbers of `masked` and `tied` layers; `opaque`, `unmasked`, `off_path`: name -> reason.
        missed: matrices and kernels that the model uses, embeddings and norms aside, that are neither masked nor
            reported as unmasked.
        dead_units: [dead, all] output units at random masks of density 0.1.
        operators: kinds of operators in the recorded evaluation graph.
        notes: of the trace report.
        seconds: stage -> seconds, and "whole".
        stage: what was being done last.
        ended: "done", or what cut the check short: "timeout", "memory" or "crash", with its `cause`.
    """

    model: str
    library: str = ""
    family: str = ""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    parameters: int = 0
    device: str = ""
    input: list[list[int]] = dataclasses.field(default_factory=list)
    other_input: list[list[int]] = dataclasses.field(default_factory=list)
    checks: dict[str, str] = dataclasses.field(default_factory=dict)
    layers: dict[str, Any] = dataclasses.field(default_factory=dict)
    missed: list[str] = dataclasses.field(default_factory=list)
    dead_units: list[int] = dataclasses.field(default_factory=list)
    operators: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    stage: str = ""
    ended: str = ""
    cause: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Facts:
        """Read what `dataclasses.asdict` wrote; `TypeError` for other names."""
        return cls(**values)

    @property
    def problems(self) -> dict[str, str]:
        """Check -> why it failed; "ended" -> what cut the check short."""
        found = {name: text.removeprefix("no: ") for name, text in self.checks.items() if text.startswith("no")}
        if self.ended != "done":
            found["ended"] = f"{self.ended} in stage `{self.stage}`: {self.cause}"
        return found

    def verdict(self, *checks: str) -> str:
        """One verdict over several checks: the first that failed, else the first that was made."""
        verdicts = [self.checks.get(name, "") for name in checks]
        bad = [verdict for verdict in verdicts if verdict.startswith("no")]
        return bad[0] if bad else next((verdict for verdict in verdicts if verdict), "")


def one_line(error: BaseException) -> str:
    """Class and message of an error in one line, without paths of this machine."""
    return scrubbed(f"{type(error).__name__}: {error}")


def scrubbed(text: str) -> str:
    """`text` in one line of bounded length, files named from their package on."""
    text = re.sub(r"[^\s'\"`(]*[/\\](?:site|dist)-packages[/\\]", "", " ".join(text.split()))
    for folder in {str(Path(__file__).resolve().parents[3]), *filter(os.path.isabs, sys.path)}:
        text = text.replace(f"{folder}{os.sep}", "")
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}[/\\][^\s'\"`:]+", "(a temporary folder)", text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
