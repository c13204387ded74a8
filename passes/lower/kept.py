"""What earlier runs chose and timed under the same conditions."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from growfx.machine import processor
from growfx.recorded.inputs import Inputs
from growfx.recorded.recording import RecordedGraph
from growfx.runtime import sparse_kernel
from growfx.runtime.choice_cache import read_choices, write_choices
from growfx.runtime.layer_kernels import CHOICES, sparse_choices
from growfx.runtime.native.library import library_fingerprint, library_status
from growfx.runtime.report import LayerLowering, is_time_table
from growfx.version import __version__

__all__ = ["Kept", "choice_key", "keep", "kept_choice"]

# Times whose median is further above the least than this were taken while the machine did something else as well.
_NOISY = 0.25
# The least of so many noisy runs is as good as one on a quiet machine.
_RUNS = 5


@dataclass(frozen=True)
class Kept:
    """What was chosen and timed.

    Attributes:
        network: way to run the network -> microseconds.
        runs: how often it was timed; times are the least of all.
        spread: of the times, as of `growfx.runtime.timing.interleaved_minima`.
        layers: by name; empty where they were not timed.
    """

    network: Mapping[str, float]
    runs: int
    spread: float
    layers: Mapping[str, LayerLowering] = field(default_factory=dict)

    @property
    def settled(self) -> bool:
        """Whether nothing else ran meanwhile, or it was tried so often that it makes no difference."""
        return self.spread <= _NOISY or self.runs >= _RUNS


def choice_key(
    model: nn.Module,
    layers: Iterable[str],
    digest: str,
    recording: RecordedGraph,
    inputs: Inputs,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What the fastest choice depends on."""
    structure = hashlib.sha256(recording.code.src.encode())
    for name in layers:
        structure.update(f"{name}: {model.get_submodule(name)};".encode())
    return {
        "dtype": str(dtype),
        "growfx": __version__,
        "inputs": repr((inputs.signature, inputs.batch)),
        "kernel": sparse_kernel.kernel_status(),
        "masks": digest,
        "native": library_status() or library_fingerprint(),
        "processor": processor(),
        "structure": structure.hexdigest(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def keep(key: Mapping[str, Any], kept: Kept) -> str:
    """Keep a choice; returns "" or the reason why it cannot be kept."""
    value = {
        "layers": [asdict(facts) for facts in kept.layers.values()],
        "network": dict(kept.network),
        "runs": kept.runs,
        "spread": kept.spread,
    }
    return write_choices(key, value)


def kept_choice(key: Mapping[str, Any], ways: Collection[str], model: nn.Module, layers: Iterable[str]) -> Kept | None:
    """What was kept; None where it does not fit, or does not say how noisy it was.

    Args:
        key: of `choice_key`.
        ways: to run the network, all of them timed.
        model: that has the layers.
        layers: those that were timed.
    """
    value, wanted = read_choices(key), list(layers)
    if not isinstance(value, dict) or not isinstance(value.get("layers"), list):
        return None
    times, rows = value.get("network"), [LayerLowering.from_json(row) for row in value["layers"]]
    found = {row.name: row for row in rows if row is not None}
    if found.keys() != set(wanted) or len(rows) != len(found):
        return None
    if not isinstance(times, dict) or times.keys() != set(ways) or not is_time_table(times):
        return None
    for name, facts in found.items():
        source: Any = model.get_submodule(name)
        if facts.choice not in CHOICES or sparse_choices(source).get(facts.choice):
            return None
    runs, spread = value.get("runs"), value.get("spread")
    if not is_time_table({"spread": spread}) or not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
        return None
    return Kept(times, runs, float(spread), {name: found[name] for name in wanted})  # type: ignore[arg-type]
