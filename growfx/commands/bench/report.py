"""What `growfx bench` found: one table a setting, and the sparse runtime's choices layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from growfx.commands.bench.peers import PACKAGES
from growfx.reporting.run import percent, table
from growfx.runtime.report import LoweringReport

__all__ = ["BenchReport", "Measurement", "Row"]

_CLOCKS = {"wall": "times by the clock", "cpu": "processor time of all threads"}


@dataclass(frozen=True)
class Row:
    """One way to run the network.

    Attributes:
        variant: its name.
        minimum, median: seconds of one call; None where it did not run, or computed something else.
        speedup: how many times as long dense torch takes, by the median of rounds; above 1 is faster.
        over_peer: how many times as long the fastest other runtime takes (`Measurement.best_peer`); None without one.
        weight_bytes: what its weights take, in memory or in the file of another runtime.
        error: largest difference of the outputs from those of dense torch, over the largest output.
        note: a remark, or why there is no time.
    """

    variant: str
    minimum: float | None = None
    median: float | None = None
    speedup: float | None = None
    over_peer: float | None = None
    weight_bytes: int | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Measurement:
    """All variants at one batch size and number of threads.

    Attributes:
        rounds: how many times each variant was timed.
        lowering: the sparse runtime's report of its choices; None where it did not run.
        best_peer: the fastest of the runtimes that ran the dense network in float32; None where none did.
    """

    batch: int
    threads: int
    rounds: int
    rows: tuple[Row, ...]
    lowering: LoweringReport | None = None
    best_peer: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values, in seconds."""
        return {
            "batch": self.batch,
            "threads": self.threads,
            "rounds": self.rounds,
            "best_peer": self.best_peer,
            "variants": [asdict(row) for row in self.rows],
            "lowering": None if self.lowering is None else self.lowering.to_json(),
        }

    def __str__(self) -> str:
        head = f"batch {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}, {self.rounds} rounds"
        text = f"{head}\n{table([_cells(row, self.best_peer) for row in self.rows])}"
        return text if self.lowering is None else f"{text}\n\nsparse runtime, layer by layer\n{self.lowering}"


@dataclass(frozen=True)
class BenchReport:
    """Times of one network on this machine; prints as tables.

    Attributes:
        path: what was measured.
        kind: `artifact`, `run` or `model`.
        inputs: shapes of the inputs, for one row of a batch.
        clock: `wall`, or `cpu` for processor seconds of all threads together.
        machine, versions: what the times hold for.
        missing: variant that was left out -> the packages it needs that are not installed.
    """

    path: str
    kind: str
    model: str
    density: float
    nnz: int
    numel: int
    dtype: str
    inputs: tuple[tuple[int, ...], ...]
    measurements: tuple[Measurement, ...]
    clock: str
    machine: dict[str, Any]
    versions: dict[str, str]
    missing: Mapping[str, Sequence[str]]

    def to_json(self) -> dict[str, Any]:
        """All facts as JSON values."""
        facts = {name: value for name, value in self.__dict__.items() if name not in ("inputs", "measurements")}
        facts["inputs"] = [list(shape) for shape in self.inputs]
        return {**facts, "measurements": [m.to_json() for m in self.measurements]}

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.inputs)
        named = [name for name in ("torch", *PACKAGES) if name in self.versions]
        libraries = ", ".join(f"{name} {self.versions[name]}" for name in named)
        head = (
            f"{self.kind} {self.path}: {self.model}, density {percent(self.density)}, {self.dtype}, inputs {shapes}\n"
            f"{self.machine['cpu']}, {self.machine['cores']} cores; {libraries}; {_CLOCKS[self.clock]}"
        )
        return "\n\n".join([head, *map(str, self.measurements), *self._absent()])

    def _absent(self) -> list[str]:
        """What else could be measured, by the packages it takes."""
        names: dict[str, list[str]] = {}
        for name, needs in self.missing.items():
            names.setdefault(" ".join(needs), []).append(name)
        return [f"not measured: {', '.join(those)} (pip install {needs})" for needs, those in names.items()]


def _cells(row: Row, best_peer: str | None) -> dict[str, str]:
    over_peer = {} if best_peer is None else {f"speed over {best_peer}": _times(row.over_peer)}
    return {
        "variant": row.variant,
        "median ms": _number(row.median, 1e3, 2),
        "minimum ms": _number(row.minimum, 1e3, 2),
        "speed over dense": _times(row.speedup),
        **over_peer,
        "weights MB": _number(row.weight_bytes, 1e-6, 2),
        "output error": "-" if row.error is None else f"{row.error:.0e}",
        "note": row.note,
    }


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _number(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value * unit:.{digits}f}"
