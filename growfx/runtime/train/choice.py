"""Which kernel a layer takes: from times measured once on this machine for each geometry, batch and density."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from growfx.machine import processor
from growfx.masked.layers import MaskedLayer
from growfx.masked.present.values import scattered
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
# Microseconds by which a layer takes longer around a sparse kernel than around torch's: it looks at its mask and asks
# for its entries. Found by layers of eight channels on 2x2 pixels; larger ones have their passes over weights in both.
_AROUND: Final = 60.0
# Microseconds that a flow takes for each call of torch that it looks at.
_LOOK: Final = 3.0
# A flow may take this much longer in its layers, for what it saves in norms and pooling.
_FLOW: Final = 1.05
# The same without times: the values laid out anew between the layers, over those that they read and make.
_MOST_TURNED: Final = 0.25
# Two measurements give the time at a third density that is not further from them than this factor.
_REACH: Final = 3.0
# Without times: a sparse kernel is taken up to this density.
_MODEL_DENSITY: Final = 0.15
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Times:
    """Microseconds of a layer's forward and, where gradients are wanted, backward; by kernel.

    Attributes:
        dense, sparse: between tensors laid out as torch lays them out.
        dense_inner, sparse_inner: between tensors whose batch is innermost; as the others for linear layers.
        panels: of the dense kernel between tensors whose batch is innermost; where there is none, as `dense_inner`.
    """

    dense: float
    sparse: float
    dense_inner: float
    sparse_inner: float
    panels: float = math.inf

    def of(self, *, inner: bool) -> dict[str, float]:
        """Times by kernel, of those that can be taken, with what a layer does around a kernel of growfx."""
        if not inner:
            return {"dense": self.dense, "sparse": self.sparse + _AROUND}
        sparse, panels = self.sparse_inner + _AROUND, self.panels + _AROUND
        return {"dense": self.dense_inner, "sparse": sparse, "panels": panels}

    def best(self, *, inner: bool) -> str:
        """The fastest kernel; torch's dense one, where no layout speaks for another, unless it is clearly slower."""
        times = self.of(inner=inner)
        name = min(times, key=lambda kernel: times[kernel])
        return name if inner or times[name] < _MARGIN * times["dense"] else "dense"


@dataclass
class _Known:
    """The times of one layer for inputs of one shape, and the density they hold for; None where nothing is timed."""

    density: float
    times: Times | None
    model: bool = False  # not timed, but chosen by density
    values: int = 0  # of the images it reads and makes; 0 for a linear layer
    grouped: bool = False

    def kernel(self, inner: bool) -> str:
        if self.model:
            # Of groups an output channel reads few channels at any density: what is laid out anew for it costs more.
            return "sparse" if self.density <= _MODEL_DENSITY or (inner and self.grouped) else "dense"
        return "sparse" if self.times is None else self.times.best(inner=inner)

    def reason(self, kernel: str) -> str:
        if self.model:
            if kernel == "sparse" and self.density > _MODEL_DENSITY:
                return "it has groups, between activations with the batch innermost"
            return f"its density is {'below' if kernel == 'sparse' else 'above'} {_MODEL_DENSITY:g}"
        if kernel == "panels":
            return "the dense kernel for activations with the batch innermost is faster"
        return "faster" if kernel == "sparse" else "the dense kernel is faster"


@dataclass
class Chooser:
    """Chooses between dense and sparse kernels, layer by layer.

    A kernel is "dense" (torch's), "sparse" (over entries alone) or, within a flow, "panels": all weights, absent ones
    as zeros, between activations whose batch is innermost.

    Attributes:
        kernels: "auto" or "sparse".
        timed: False chooses by density alone, which is the same on every machine and in every process.
        table: key (geometry, batch) -> density -> times; what was measured or given.
        known: (layer, situation) -> what was chosen.
        last: layer -> what was chosen last.
        turned: in the last flow, the values that were laid out anew between these layers, over those that the layers
            read and make; None before the first.
        calls: of torch that the last flow looked at.
    """

    kernels: str
    timed: bool = True
    table: dict[str, dict[float, Times]] = field(default_factory=dict)
    known: dict[tuple[str, Any], _Known] = field(default_factory=dict)
    last: dict[str, _Known] = field(default_factory=dict)
    turned: float | None = None
    calls: int = 0
    _flow_pays: bool | None = None  # what `flow_pays` found for `last`
    _rows_pay: bool | None = None  # what `rows_pay` found for `last`

    def choose(
        self,
        name: str,
        layer: MaskedLayer,
        geometry: Geometry,
        entries: Entries,
        x: Tensor,
        out_size: list[int],
        inner: bool,
    ) -> tuple[str, str]:
        """The kernel that the layer `name` is to take for `x`, and why; `inner`: within a flow."""
        if self.kernels == "sparse":
            return "sparse", "asked for"
        gradient = torch.is_grad_enabled() and layer.trained.requires_grad
        situation = (tuple(x.shape), str(x.dtype), gradient, x.requires_grad, torch.get_num_threads())
        known = self.known.get((name, situation))
        density = entries.nnz / layer.numel
        if known is None or not known.density / _STEP < density < known.density * _STEP:
            known = replace(self._choose(name, layer, geometry, entries, x, out_size), values=0)
            self.known[name, situation] = known
        if geometry.kernel and not known.values:  # or read from a checkpoint of before it was counted
            known.values = x.numel() + x.shape[0] * layer.mask.shape[0] * math.prod(out_size)
            known.grouped = geometry.groups > 1
        if self.last.get(name) is not known:
            self.last[name] = known
            self._flow_pays = self._rows_pay = None
        kernel = known.kernel(inner)
        return kernel, known.reason(kernel)

    def flow_pays(self) -> bool:
        """Whether the layers, as last chosen, take less time in all with the batch innermost in memory."""
        if self._flow_pays is None:
            self._flow_pays = self._compare_flow()
        return self._flow_pays

    def note_flow(self, turned: int, calls: int) -> None:
        """Learn what a flow cost beside its layers: values laid out anew between those of `last`, and calls seen."""
        share = turned / max(1, sum(known.values for known in self.last.values()))
        if (share, calls) != (self.turned, self.calls):
            self.turned, self.calls, self._flow_pays = share, calls, None

    def feeds_rows(self, readers: Collection[str]) -> bool:
        """Whether the linear layers `readers` all took their sparse kernels last, which read rows as another left them.

        True for those that have not been called.
        """
        if self.kernels == "sparse":
            return True
        found = (self.last.get(name) for name in readers)
        return all(known is None or known.kernel(False) == "sparse" for known in found)

    def rows_pay(self, names: Collection[str]) -> bool:
        """Whether any of the linear layers `names` took its sparse kernel last, which alone leaves rows to be kept."""
        if self.kernels == "sparse":
            return True
        if self._rows_pay is None:
            found = (self.last.get(name) for name in names)
            self._rows_pay = any(known is not None and known.kernel(False) == "sparse" for known in found)
        return self._rows_pay

    def _compare_flow(self) -> bool:
        turned = self.turned or 0.0
        if not self.timed:
            sparse = sum(known.kernel(True) == "sparse" for known in self.last.values())
            return sparse * 2 > len(self.last) and turned < _MOST_TURNED
        times = [known.times for known in self.last.values() if known.times is not None]
        plain, inner = (sum(min(t.of(inner=which).values()) for t in times) for which in (False, True))
        # What torch's kernel takes longer between images whose batch is innermost is that both are laid out anew. What
        # is turned for something else is turned back for the next layer.
        turn = sum(max(0.0, t.dense_inner - t.dense) for t in times)
        return inner + 2 * turned * turn + _LOOK * self.calls < _FLOW * plain

    def last_times(self, name: str) -> Times | None:
        """The times that decided what the layer `name` took last; None where nothing was timed."""
        return self.last[name].times if name in self.last else None

    def state_dict(self) -> dict[str, Any]:
        """What was measured and chosen, as plain values: a run that goes on from it takes the same kernels."""
        known = [[name, list(map(_plain, at)), *_known_values(choice)] for (name, at), choice in self.known.items()]
        return {
            "table": {key: [[d, *astuple(times)] for d, times in row.items()] for key, row in self.table.items()},
            "known": known,
            "last": {name: _known_values(choice) for name, choice in self.last.items()},
            "turned": self.turned,
            "calls": self.calls,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.table = {key: {d: Times(*times) for d, *times in row} for key, row in state["table"].items()}
        self.known = {
            (name, tuple(tuple(part) if isinstance(part, list) else part for part in at)): _known(values)
            for name, at, *values in state["known"]
        }
        self.last = {name: _known(values) for name, values in state["last"].items()}
        self.turned, self.calls = state.get("turned"), state.get("calls", 0)
        self._flow_pays = self._rows_pay = None

    def _choose(
        self, name: str, layer: MaskedLayer, geometry: Geometry, entries: Entries, x: Tensor, out_size: list[int]
    ) -> _Known:
        density = entries.nnz / layer.numel
        if density == 0 or not self.timed:
            return _Known(density, None, model=not self.timed)
        gradient = torch.is_grad_enabled() and layer.trained.requires_grad
        larger = None if gradient else self._of_a_larger_batch(name, x, density)
        if larger is not None:
            return larger
        key = _key(layer, geometry, x, gradient)
        with _ONE_AT_A_TIME:
            row = self.table.setdefault(key, {})
            times = _between(row, density) or _between(row := {**_read(key), **row}, density)
            if times is None:
                times = row[density] = _measure(layer, geometry, entries, x, out_size, gradient)
                write_choices(_file_key(key), [[d, *astuple(known)] for d, known in sorted(row.items())])
            self.table[key] = row
        return _Known(density, times)

    def _of_a_larger_batch(self, name: str, x: Tensor, density: float) -> _Known | None:
        """What was chosen for more images of the same size: the last batch of a data set is small."""
        for (other, (shape, *rest)), known in self.known.items():
            same = other == name and shape[1:] == tuple(x.shape[1:]) and shape[0] > x.shape[0]
            if same and rest[:2] == [str(x.dtype), False] and known.density / _STEP < density < known.density * _STEP:
                return known
        return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _known_values(choice: _Known) -> list[Any]:
    times = None if choice.times is None else list(astuple(choice.times))
    return [choice.density, times, choice.model, choice.values, choice.grouped]


def _known(values: Sequence[Any]) -> _Known:
    density, times, *more = values  # a checkpoint of before has fewer of them
    return _Known(density, None if times is None else Times(*times), *more)


def _between(row: Mapping[float, Times], density: float) -> Times | None:
    """Times at a density, from those measured at others: what a sparse kernel does grows evenly with its entries.

    None where nothing was measured within a fifth, nor at densities below and above within a factor of `_REACH`.
    """
    near = min(row, key=lambda known: abs(math.log(known / density)), default=None)
    if near is not None and density / _STEP < near < density * _STEP:
        return row[near]
    below = max((d for d in row if d < density), default=0.0)
    above = min((d for d in row if d > density), default=math.inf)
    if below * _REACH < density or above > density * _REACH:
        return None
    a, b, share = row[below], row[above], (density - below) / (above - below)
    line = [u + share * (v - u) for u, v in zip(astuple(a), astuple(b), strict=True)]
    panels = min(a.panels, b.panels)
    return Times(min(a.dense, b.dense), line[1], min(a.dense_inner, b.dense_inner), line[3], panels)


def _key(layer: MaskedLayer, g: Geometry, x: Tensor, gradient: bool) -> str:
    shape = tuple(x.shape) if g.kernel else (x.numel() // x.shape[-1], x.shape[-1])
    parts = [
        f"input {'x'.join(map(str, shape))} {str(x.dtype).removeprefix('torch.')}",
        f"weight {'x'.join(map(str, layer.mask.shape))}{'' if layer.present is None else ' of present edges'}",
        f"stride {g.stride} padding {g.front}{g.back} dilation {g.dilation}",
        f"{'backward' if gradient else 'forward'}{' input' if gradient and x.requires_grad else ''}",
        f"threads {torch.get_num_threads()}",
    ]
    return ", ".join(parts)


def _file_key(key: str) -> dict[str, Any]:
    return {"training": key, "torch": torch.__version__, "processor": processor(), "version": 6}


def _read(key: str) -> dict[float, Times]:
    """What was measured before, by density; nothing where the file holds anything else."""
    found = read_choices(_file_key(key))
    rows = found if isinstance(found, list) else []
    good = [row for row in rows if isinstance(row, list) and len(row) == 6 and all(_is_time(value) for value in row)]
    return {density: Times(*times) for density, *times in good}


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < math.inf


def _measure(layer: Any, geometry: Geometry, entries: Entries, x: Tensor, out_size: list[int], gradient: bool) -> Times:
    """Time the kernels on copies, away from the graph and the generators of the caller."""
    weight = layer.trained.detach().clone(memory_format=torch.preserve_format).requires_grad_(gradient)
    generator, wanted = torch.Generator().manual_seed(0), gradient and x.requires_grad
    images = torch.empty(x.shape, dtype=x.dtype, device="cpu").normal_(generator=generator).requires_grad_(wanted)
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
        if geometry.groups == 1:
            calls["panels"] = lambda: _step(
                product(inner, weight, bias, entries, geometry, out_size, inner=True, panels=True), weight, inner
            )
    with torch.enable_grad() if gradient else torch.no_grad(), torch.autocast("cpu", enabled=False):
        # Of one thread, the time that others do not take from it.
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        found = interleaved_minima(calls, least_rounds=_ROUNDS, seconds=_SECONDS, clock=clock)
    return Times(
        *(found["dense"], found["sparse"]),
        *(found.get("dense_inner", found["dense"]), found.get("sparse_inner", found["sparse"])),
        found.get("panels", found.get("dense_inner", found["dense"])),
    )


def _dense_inner(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    ops = torch.ops.growfx
    return ops.batch_inner(_dense(layer, weight, bias, ops.batch_outer(x, x.dtype)))


def _dense(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if weight.shape != layer.mask.shape:  # values of present edges
        weight = scattered(weight, layer.mask)
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def _step(out: Tensor, weight: Tensor, x: Tensor) -> None:
    wanted = [t for t in (weight, x) if t.requires_grad]
    if wanted:
        torch.autograd.grad(out, wanted, torch.ones_like(out))
