"""What lowering a network to the sparse runtime did: the kernel of every layer, what was timed, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["LayerLowering", "LoweringReport", "is_time_table"]


@dataclass(frozen=True)
class LayerLowering:
    """One layer.

    Attributes:
        name: its name in the model.
        weight: the shape of its weight.
        density: active weights over all.
        input: the shape of its input when it was timed; () where it was not.
        choice: `dense`, `csr` or `direct`; `native` in a network that the native runtime runs.
        microseconds: choice -> the minimum over the runs, of all calls of the layer in one run of the network.
        reason: why this choice.
        nbytes: bytes of its weight, as it is kept.
    """

    name: str
    weight: tuple[int, ...]
    density: float
    input: tuple[int, ...] = ()
    choice: str = "dense"
    microseconds: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    nbytes: int = 0

    @classmethod
    def from_json(cls, value: object) -> LayerLowering | None:
        """What `asdict` gave, through JSON and back; None where it is anything else."""
        if not isinstance(value, dict) or value.keys() != {f.name for f in fields(cls)}:
            return None
        shapes, times = (value["weight"], value["input"]), value["microseconds"]
        texts = all(isinstance(value[key], str) for key in ("name", "choice", "reason"))
        counts = isinstance(value["nbytes"], int) and all(isinstance(shape, list) for shape in shapes)
        if not texts or not counts or not is_time_table(times) or not is_time_table({"density": value["density"]}):
            return None
        if not all(isinstance(n, int) for shape in shapes for n in shape):
            return None
        known: dict[str, Any] = {**value, "weight": tuple(value["weight"]), "input": tuple(value["input"])}
        return cls(**known)


def is_time_table(value: object) -> bool:
    """Whether a value that was read is a dict of numbers that can be times."""
    numbers = list(value.values()) if isinstance(value, dict) else [None]
    return all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers)


@dataclass(frozen=True)
class LoweringReport:
    """How a network runs, and what was measured to decide it; prints as a table.

    Attributes:
        layers: in data-flow order.
        taken: `native` (by the native runtime, in one call where it has a kernel for everything), `lowered`, `dense`
            (norms folded, relu and sums fused, every layer dense) or `plain` (as loaded).
        microseconds: each of these -> the minimum over runs of the whole network; empty where nothing was timed.
        nbytes: bytes of the layers' weights in the plain network, and as they are kept.
        inputs: shapes of the inputs that it was timed on.
        dtype: of the weights.
        threads: of torch at that time.
        kernel: "" or the reason why the direct kernel cannot be had here.
        cached: the choice was not timed now but read.
        notes: anything else worth knowing, one sentence each.
        native: "" or the reason why the native runtime does not run the network.
        native_calls: how often the native runtime is called in one run of the network.
        torch_steps: the operators that torch computes between these calls, and how often each.
    """

    layers: tuple[LayerLowering, ...]
    taken: str
    microseconds: Mapping[str, float] = field(default_factory=dict)
    nbytes: tuple[int, int] = (0, 0)
    inputs: tuple[tuple[int, ...], ...] = ()
    dtype: str = "float32"
    threads: int = 1
    kernel: str = ""
    cached: bool = False
    notes: tuple[str, ...] = ()
    native: str = ""
    native_calls: int = 0
    torch_steps: Mapping[str, int] = field(default_factory=dict)

    @property
    def choices(self) -> dict[str, str]:
        """Layer -> its choice."""
        return {layer.name: layer.choice for layer in self.layers}

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return _listed(asdict(self))

    def __str__(self) -> str:
        from tabulate import tabulate

        times = ("dense", "csr", "direct")
        rows = [
            [x.name, "x".join(map(str, x.weight)), f"{x.density:.2%}", x.choice]
            + [f"{x.microseconds[t]:.0f}" if t in x.microseconds else "" for t in times]
            + [x.reason]
            for x in self.layers
        ]
        headers = ["layer", "weight", "density", "choice", *(f"{t}, us" for t in times), "reason"]
        return "\n".join([tabulate(rows, headers=headers, disable_numparse=True), *self._totals(), *self.notes])

    def _totals(self) -> list[str]:
        counts = Counter(layer.choice for layer in self.layers)
        lines = [", ".join(f"{count} layers {choice}" for choice, count in sorted(counts.items()))] if counts else []
        if self.microseconds:
            shapes = ", ".join("x".join(map(str, shape)) for shape in self.inputs)
            spent = ", ".join(f"{name} {time / 1000:.3g} ms" for name, time in self.microseconds.items())
            source = " (kept from an earlier run)" if self.cached else ""
            lines.append(f"whole network on {shapes}, {self.dtype}, {self.threads} threads{source}: {spent}")
        how = f" ({self._calls()})" if self.native_calls else ""
        lines.append(f"running: {self.taken}{how}; weights {self.nbytes[0]:,} bytes plain, {self.nbytes[1]:,} as kept")
        lines += [f"no direct kernel: {self.kernel}"] if self.kernel else []
        return [*lines, f"not by the native runtime: {self.native}"] if self.native else lines

    def _calls(self) -> str:
        if not self.torch_steps:
            return "one call" if self.native_calls == 1 else f"{self.native_calls} calls"
        steps = ", ".join(f"{name} ({count})" for name, count in sorted(self.torch_steps.items()))
        return f"{self.native_calls} calls; torch computes {steps}"


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
