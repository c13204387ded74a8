"""Which kernel a layer takes: from times measured once on this machine for each geometry, batch and density."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from growfx.machine import processor
from growfx.masked.layers import MaskedLayer
from growfx.runtime.choice_cache import read_choices, write_choices
from growfx.runtime.timing import interleaved_minima
from growfx.runtime.train.entries import Entries, Geometry, product

__all__ = ["KERNELS", "Chooser", "Times"]

KERNELS: Final = ("auto", "dense", "sparse")
# A layer keeps its kernel while its density stays within this factor.
_STEP: Final = 1.2
_ROUNDS, _SECONDS = 3, 0.05
# The sparse kernel has to be this much faster than the dense one.
_MARGIN: Final = 0.95
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Times:
    """Microseconds of a layer's forward and, where gradients are wanted, backward; by kernel."""

    dense: float
    sparse: float


@dataclass
class _Known:
    """What one layer takes for inputs of one shape, and the density that was decided for."""

    sparse: bool
    density: float
    times: Times | None


@dataclass
class Chooser:
    """Chooses between dense and sparse kernels, layer by layer.

    Attributes:
        kernels: "auto" or "sparse".
        table: key (geometry, batch, density) -> times; what was measured or given.
        known: (layer, shape, gradient) -> what was chosen.
    """

    kernels: str
    table: dict[str, Times] = field(default_factory=dict)
    known: dict[tuple[str, Any], _Known] = field(default_factory=dict)

    def takes_sparse(
        self,
        name: str,
        layer: MaskedLayer,
        geometry: Geometry,
        entries: Entries,
        x: Tensor,
        out_size: list[int],
    ) -> tuple[bool, str]:
        """Whether the layer `name` is to take its sparse kernel for `x`, and why."""
        if self.kernels == "sparse":
            return True, "asked for"
        gradient = torch.is_grad_enabled() and layer.parameter.requires_grad
        situation = (name, (tuple(x.shape), x.dtype, gradient, x.requires_grad, torch.get_num_threads()))
        known = self.known.get(situation)
        density = entries.nnz / layer.numel
        if known is None or not known.density / _STEP < density < known.density * _STEP:
            known = self._choose(layer, geometry, entries, x, out_size)
            self.known[situation] = known
        return known.sparse, "faster" if known.sparse else "the dense kernel is faster"

    def last_times(self, name: str) -> Times | None:
        """The times that decided what the layer `name` took last; None where nothing was timed."""
        times = [known.times for (layer, _), known in self.known.items() if layer == name]
        return times[-1] if times else None

    def _choose(
        self, layer: MaskedLayer, geometry: Geometry, entries: Entries, x: Tensor, out_size: list[int]
    ) -> _Known:
        density = entries.nnz / layer.numel
        if density == 0:
            return _Known(True, density, None)
        gradient = torch.is_grad_enabled() and layer.parameter.requires_grad
        key = _key(layer, geometry, x, gradient, round(math.log(density) / math.log(_STEP)))
        with _ONE_AT_A_TIME:
            times = self.table.get(key) or _read(key)
            if times is None:
                times = _measure(layer, geometry, entries, x, out_size, gradient)
                write_choices(_file_key(key), [times.dense, times.sparse])
            self.table[key] = times
        return _Known(times.sparse < _MARGIN * times.dense, density, times)


def _key(layer: MaskedLayer, g: Geometry, x: Tensor, gradient: bool, bucket: int) -> str:
    shape = tuple(x.shape) if g.kernel else (x.numel() // x.shape[-1], x.shape[-1])
    parts = [
        f"input {'x'.join(map(str, shape))} {str(x.dtype).removeprefix('torch.')}",
        f"weight {'x'.join(map(str, layer.parameter.shape))}",
        f"stride {g.stride} padding {g.front}{g.back} dilation {g.dilation}",
        f"layout {x.stride()[1:] if g.kernel else ''}",
        f"{'backward' if gradient else 'forward'}{' input' if gradient and x.requires_grad else ''}",
        f"density {_STEP**bucket:.3g}",
        f"threads {torch.get_num_threads()}",
    ]
    return ", ".join(parts)


def _file_key(key: str) -> dict[str, Any]:
    return {"training": key, "torch": torch.__version__, "processor": processor(), "version": 1}


def _read(key: str) -> Times | None:
    found = read_choices(_file_key(key))
    if isinstance(found, list) and len(found) == 2 and all(isinstance(v, float) and v > 0 for v in found):
        return Times(*found)
    return None


def _measure(layer: Any, geometry: Geometry, entries: Entries, x: Tensor, out_size: list[int], gradient: bool) -> Times:
    """Time both kernels on copies, away from the graph and the generators of the caller."""
    weight = layer.parameter.detach().clone(memory_format=torch.preserve_format).requires_grad_(gradient)
    images = torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(0))
    images.requires_grad_(gradient and x.requires_grad)
    bias: Any = None if layer.bias is None else layer.bias.detach()
    calls = {
        "dense": lambda: _step(_dense(layer, weight, bias, images), weight, images),
        "sparse": lambda: _step(product(images, weight, bias, entries, geometry, out_size), weight, images),
    }
    with torch.enable_grad() if gradient else torch.no_grad(), torch.autocast("cpu", enabled=False):
        found = interleaved_minima(calls, least_rounds=_ROUNDS, seconds=_SECONDS)
    return Times(found["dense"], found["sparse"])


def _dense(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def _step(out: Tensor, weight: Tensor, x: Tensor) -> None:
    wanted = [t for t in (weight, x) if t.requires_grad]
    if wanted:
        torch.autograd.grad(out, wanted, torch.ones_like(out))
