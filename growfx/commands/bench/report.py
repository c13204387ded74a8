"""What `growfx bench` found: one table a setting, and the sparse runtime's choices layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from growfx.reporting.run import percent, table
from growfx.runtime.report import LoweringReport

__all__ = ["BenchReport", "Measurement", "Row"]


@dataclass(frozen=True)
class Row:
    """One way to run the network.

    Attributes:
        variant: its name.
        minimum, median: seconds of one call; None where it did not run, or computed something else.
        speedup: how many times as long dense torch takes, by the median of rounds; above 1 is faster.
        weight_bytes: what its weights take, in memory or in the file of another runtime.
        error: largest difference of the outputs from those of dense torch, over the largest output.
        note: a remark, or why there is no time.
    """

    variant: str
    minimum: float | None = None
    median: float | None = None
    speedup: float | None = None
    weight_bytes: int | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Measurement:
    """All variants at one batch size and number of threads.

    Attributes:
        rounds: how many times each variant was timed.
        lowering: the sparse runtime's report of its choices; None where it did not run.
    """

    batch: int
    threads: int
    rounds: int
    rows: tuple[Row, ...]
    lowering: LoweringReport | None = None

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values, in seconds."""
        return {
            "batch": self.batch,
            "threads": self.threads,
            "rounds": self.rounds,
            "variants": [asdict(row) for row in self.rows],
            "lowering": None if self.lowering is None else self.lowering.to_json(),
        }

    def __str__(self) -> str:
        head = f"batch {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}, {self.rounds} rounds"
        text = f"{head}\n{table([_cells(row) for row in self.rows])}"
        return text if self.lowering is None else f"{text}\n\nsparse runtime, layer by layer\n{self.lowering}"


@dataclass(frozen=True)
class BenchReport:
    """Times of one network on this machine; prints as tables.

    Attributes:
        path: what was measured.
        kind: `artifact`, `run` or `model`.
        inputs: shapes of the inputs, for one row of a batch.
        machine, versions: what the times hold for.
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
    machine: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """All facts as JSON values."""
        facts = {name: value for name, value in self.__dict__.items() if name not in ("inputs", "measurements")}
        facts["inputs"] = [list(shape) for shape in self.inputs]
        return {**facts, "measurements": [m.to_json() for m in self.measurements]}

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.inputs)
        head = (
            f"{self.kind} {self.path}: {self.model}, density {percent(self.density)}, {self.dtype}, inputs {shapes}\n"
            f"{self.machine['cpu']}, {self.machine['cores']} cores; torch {self.versions['torch']}"
        )
        return "\n\n".join([head, *map(str, self.measurements)])


def _cells(row: Row) -> dict[str, str]:
    return {
        "variant": row.variant,
        "median ms": _number(row.median, 1e3, 2),
        "minimum ms": _number(row.minimum, 1e3, 2),
        "speed over dense": "-" if row.speedup is None else f"{row.speedup:.2f}x",
        "weights MB": _number(row.weight_bytes, 1e-6, 2),
        "output error": "-" if row.error is None else f"{row.error:.0e}",
        "note": row.note,
    }


def _number(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value * unit:.{digits}f}"
