"""What `use_kernels` chose, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["KernelReport", "LayerChoice"]


@dataclass(frozen=True)
class LayerChoice:
    """One layer's kernel.

    Attributes:
        kernel: "dense" or "sparse", of the last call.
        reason: why.
        dense, sparse: microseconds of forward and backward, where they were timed.
        density: active weights over all weights.
    """

    kernel: str
    reason: str
    dense: float | None
    sparse: float | None
    density: float


@dataclass(frozen=True)
class KernelReport:
    """The kernels of a network's masked layers; prints as a table.

    Attributes:
        kernels: what was asked for: "auto", "dense" or "sparse".
        layers: choice of each layer, by name.
        notes: what holds for all of them, such as why there are no sparse kernels on this machine.
        storage: "dense" or "present": whether parameters are whole weights or values of present edges.
    """

    kernels: str
    layers: dict[str, LayerChoice]
    notes: tuple[str, ...] = ()
    storage: str = "dense"

    def to_json(self) -> dict[str, Any]:
        """JSON values: `kernels`, `storage`, `notes`, and by layer the fields of its choice, times as `..._us`."""
        layers = {name: _row(choice) for name, choice in self.layers.items()}
        return {"kernels": self.kernels, "storage": self.storage, "notes": list(self.notes), "layers": layers}

    def __str__(self) -> str:
        width = max([5, *map(len, self.layers)])
        lines = [f"kernels: {self.kernels}, storage: {self.storage}", *self.notes]
        lines.append(f"{'layer':<{width}} {'density':>8} {'kernel':<7} {'dense us':>9} {'sparse us':>9}  reason")
        for name, choice in self.layers.items():
            times = " ".join(f"{'-' if t is None else format(t, '.0f'):>9}" for t in (choice.dense, choice.sparse))
            lines.append(f"{name:<{width}} {choice.density:>8.4f} {choice.kernel:<7} {times}  {choice.reason}")
        return "\n".join(lines)


def _row(choice: LayerChoice) -> dict[str, Any]:
    return {
        "kernel": choice.kernel,
        "reason": choice.reason,
        "dense_us": choice.dense,
        "sparse_us": choice.sparse,
        "density": choice.density,
    }
