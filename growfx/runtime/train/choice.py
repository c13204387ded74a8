"""Which kernel a layer takes: from times measured once on this machine for each geometry, batch and density."""

from __future__ import annotations

import math
import threading
import time
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
_ROUNDS, _SECONDS = 4, 0.05
# The sparse kernel has to be this much faster than the dense one.
_MARGIN: Final = 0.95
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Times:
    """Microseconds of a layer's forward and, where gradients are wanted, backward; by kernel.

    Attributes:
        dense, sparse: between tensors laid out as torch lays them out.
        dense_inner, sparse_inner: between tensors whose batch is innermost; as the others for linear layers.
    """

    dense: float
    sparse: float
    dense_inner: float
    sparse_inner: float

    def of(self, *, inner: bool) -> tuple[float, float]:
        """Times of the dense and the sparse kernel."""
        return (self.dense_inner, self.sparse_inner) if inner else (self.dense, self.sparse)


@dataclass
class _Known:
    """The times of one layer for inputs of one shape, and the density they hold for; None where nothing is timed."""

    density: float
    times: Times | None

    def takes_sparse(self, inner: bool) -> bool:
        if self.times is None:
            return True
        dense, sparse = self.times.of(inner=inner)
        return sparse < _MARGIN * dense


@dataclass
class Chooser:
    """Chooses between dense and sparse kernels, layer by layer.

    Attributes:
        kernels: "auto" or "sparse".
        table: key (geometry, batch, density) -> times; what was measured or given.
        known: (layer, shape, gradient) -> what was chosen.
        last: layer -> what was chosen last.
    """

    kernels: str
    table: dict[str, Times] = field(default_factory=dict)
    known: dict[tuple[str, Any], _Known] = field(default_factory=dict)
    last: dict[str, _Known] = field(default_factory=dict)

    def takes_sparse(
        self,
        name: str,
        layer: MaskedLayer,
        geometry: Geometry,
        entries: Entries,
        x: Tensor,
        out_size: list[int],
        inner: bool,
    ) -> tuple[bool, str]:
        """Whether the layer `name` is to take its sparse kernel for `x`, and why; `inner`: within a flow."""
        if self.kernels == "sparse":
            return True, "asked for"
        gradient = torch.is_grad_enabled() and layer.parameter.requires_grad
        situation = (name, (tuple(x.shape), x.dtype, gradient, x.requires_grad, torch.get_num_threads()))
        known = self.known.get(situation)
        density = entries.nnz / layer.numel
        if known is None or not known.density / _STEP < density < known.density * _STEP:
            known = self._choose(layer, geometry, entries, x, out_size)
            self.known[situation] = known
        self.last[name] = known
        sparse = known.takes_sparse(inner)
        return sparse, "faster" if sparse else "the dense kernel is faster"

    def flow_pays(self) -> bool:
        """Whether the layers, as last chosen, take less time in all with the batch innermost in memory."""
        times = [known.times for known in self.last.values() if known.times is not None]
        plain, inner = (sum(min(t.of(inner=which)) for t in times) for which in (False, True))
        return inner < _MARGIN * plain

    def last_times(self, name: str) -> Times | None:
        """The times that decided what the layer `name` took last; None where nothing was timed."""
        return self.last[name].times if name in self.last else None

    def _choose(
        self, layer: MaskedLayer, geometry: Geometry, entries: Entries, x: Tensor, out_size: list[int]
    ) -> _Known:
        density = entries.nnz / layer.numel
        if density == 0:
            return _Known(density, None)
        gradient = torch.is_grad_enabled() and layer.parameter.requires_grad
        key = _key(layer, geometry, x, gradient, round(math.log(density) / math.log(_STEP)))
        with _ONE_AT_A_TIME:
            times = self.table.get(key) or _read(key)
            if times is None:
                times = _measure(layer, geometry, entries, x, out_size, gradient)
                write_choices(_file_key(key), [times.dense, times.sparse, times.dense_inner, times.sparse_inner])
            self.table[key] = times
        return _Known(density, times)


def _key(layer: MaskedLayer, g: Geometry, x: Tensor, gradient: bool, bucket: int) -> str:
    shape = tuple(x.shape) if g.kernel else (x.numel() // x.shape[-1], x.shape[-1])
    parts = [
        f"input {'x'.join(map(str, shape))} {str(x.dtype).removeprefix('torch.')}",
        f"weight {'x'.join(map(str, layer.parameter.shape))}",
        f"stride {g.stride} padding {g.front}{g.back} dilation {g.dilation}",
        f"{'backward' if gradient else 'forward'}{' input' if gradient and x.requires_grad else ''}",
        f"density {_STEP**bucket:.3g}",
        f"threads {torch.get_num_threads()}",
    ]
    return ", ".join(parts)


def _file_key(key: str) -> dict[str, Any]:
    return {"training": key, "torch": torch.__version__, "processor": processor(), "version": 3}


def _read(key: str) -> Times | None:
    found = read_choices(_file_key(key))
    if isinstance(found, list) and len(found) == 4 and all(isinstance(v, float) and v > 0 for v in found):
        return Times(*found)
    return None


def _measure(layer: Any, geometry: Geometry, entries: Entries, x: Tensor, out_size: list[int], gradient: bool) -> Times:
    """Time the kernels on copies, away from the graph and the generators of the caller."""
    weight = layer.parameter.detach().clone(memory_format=torch.preserve_format).requires_grad_(gradient)
    generator, wanted = torch.Generator().manual_seed(0), gradient and x.requires_grad
    images = torch.empty(x.shape, dtype=x.dtype).normal_(generator=generator).requires_grad_(wanted)
    bias: Any = None if layer.bias is None else layer.bias.detach()
    calls = {
        "dense": lambda: _step(_dense(layer, weight, bias, images), weight, images),
        "sparse": lambda: _step(product(images, weight, bias, entries, geometry, out_size), weight, images),
    }
    if geometry.kernel and x.dtype == torch.float32:
        inner = torch.ops.growfx.batch_inner(images.detach()).requires_grad_(wanted)
        calls |= {
            "dense_inner": lambda: _step(_dense_inner(layer, weight, bias, inner), weight, inner),
            "sparse_inner": lambda: _step(
                product(inner, weight, bias, entries, geometry, out_size, inner=True), weight, inner
            ),
        }
    with torch.enable_grad() if gradient else torch.no_grad(), torch.autocast("cpu", enabled=False):
        # Of one thread, the time that others do not take from it.
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        found = interleaved_minima(calls, least_rounds=_ROUNDS, seconds=_SECONDS, clock=clock)
    return Times(
        *(found["dense"], found["sparse"]),
        *(found.get("dense_inner", found["dense"]), found.get("sparse_inner", found["sparse"])),
    )


def _dense_inner(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    ops = torch.ops.growfx
    return ops.batch_inner(_dense(layer, weight, bias, ops.batch_outer(x, x.dtype)))


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
