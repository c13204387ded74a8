"""Whether the native runtime computes what a masked network computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from growfx.deploy.native.export import native_plan
from growfx.errors import TraceError
from growfx.masked.graph import MaskedGraph
from growfx.passes.lower.plan.file import network_bytes
from growfx.runtime.native.library import NativeNetwork, library_status

__all__ = ["NOT_EXPORTED", "NativeCheck", "check_native"]

NOT_EXPORTED = "n/a: not exported"
_TOLERANCE = 1e-4  # of the largest output
_BATCH = 2


@dataclass(frozen=True)
class NativeCheck:
    """What was found.

    Attributes:
        verdict: "yes", "no: why", or "n/a: why".
        error: of the outputs, over the largest.
        bytes: of the file.
        steps: calls of a kernel.
    """

    verdict: str
    error: float = 0.0
    bytes: int = 0
    steps: int = 0


def check_native(net: MaskedGraph) -> NativeCheck:
    """Plan a network, and compare its outputs on seeded noise at another batch size than it was recorded at."""
    reason = library_status()
    if reason:
        return NativeCheck(f"n/a: no library: {reason}")
    try:
        plan = native_plan(net)
    except TraceError as refusal:
        return NativeCheck(f"{NOT_EXPORTED}: {refusal}")
    data = network_bytes(plan)
    generator = torch.Generator().manual_seed(1)
    shapes = [tuple(x.shape) for x in net.example().with_batch(_BATCH).args if isinstance(x, Tensor)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    net.eval()
    with torch.no_grad():
        expected = [x for x in pytree.tree_leaves(net(*inputs)) if isinstance(x, Tensor)]
    got = NativeNetwork(data)(*inputs)
    if [x.shape for x in got] != [x.shape for x in expected]:
        return NativeCheck("no: outputs of other shapes", bytes=len(data), steps=len(plan.steps))
    error = max(_error(a, b) for a, b in zip(got, expected, strict=True))
    verdict = "yes" if error <= _TOLERANCE else f"no: outputs differ by {error:.1e} of the largest"
    return NativeCheck(verdict, error, len(data), len(plan.steps))


def _error(got: Tensor, expected: Tensor) -> float:
    wrong = (got - expected.float()).abs()
    wrong = wrong.where(~(got.isnan() & expected.isnan()) & (got != expected), 0)
    return float(wrong.max().nan_to_num(torch.inf) / expected.abs().max().nan_to_num(1.0).clamp_min(1e-30))
