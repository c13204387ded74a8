"""Call a network as it is and as torch exported it, to see whether both compute the same at other batch sizes.

torch's exporter takes one path through a model's Python. Where that asks for the batch size, the path is that of the
example: torch refuses what it can tell to hold for no other size, and is silent about conditions such as
`len(x) == 1` or `len(x) % 2 == 0`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.errors import one_line
from growfx.masked.isolation import generators_restored
from growfx.masked.module_copy import copy_modules, separate_hooks
from growfx.recorded.inputs import Inputs, tensors_in

__all__ = ["Trial"]

_SIZES = (1, 3)  # beside that of the example, which is two where it was one
_LARGEST = 4096  # of a batch that is tried
# How far two ways to the same sum may be apart, as a fraction of the largest output.
_APART, _APART_IN_16_BITS = 1e-3, 5e-2
_16_BITS = (torch.float16, torch.bfloat16)
_LONGEST_REASON = 200


class Trial:
    """A copy of a model whose calls leave nothing behind; it has the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._model = copy_modules(model, {id(parameter): parameter for parameter in model.parameters()})
        separate_hooks(self._model)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._cuda = [device.index or 0] if device.type == "cuda" else []

    def outputs(self, call: Inputs) -> list[Any]:
        """What the model returns, without its containers; nothing where it fails, which is for the exporter to tell."""
        try:
            with generators_restored(self._cuda, self._model):
                return _called(self._model, call)
        except Exception:  # the model's own code: it may raise anything
            return []

    def depends_on_batch(self, exported: Any, call: Inputs) -> str:
        """Why the exported program does not hold for every batch size, "" where nothing speaks against it."""
        program, batch, largest = exported.module(), _batch_of(call), _largest_batch(exported)
        if largest and not (batch and largest < _LARGEST and self._refuses(_of_size(call, largest + 1))):
            return f"what the model did holds for batches of up to {largest}"
        changing, apart = bool(exported.graph_signature.buffers_to_mutate), _apart(exported)
        with generators_restored(self._cuda, self._model):
            for size in _SIZES if batch else ():
                other = _of_size(call, size)
                try:
                    expected, again = _called(self._model, other), _called(self._model, other)
                except Exception:  # not a size that the model takes
                    continue
                try:
                    found = _called(program, other)
                except Exception as error:
                    reason = one_line(error)[:_LONGEST_REASON]
                    return f"what the model did with a batch of {batch} fails with one of {size} ({reason})"
                repeats = not changing and _equal(expected, again, apart)
                if not _equal(expected, found, apart if repeats else None):
                    return f"with a batch of {size} the model does something else than with one of {batch}"
        return ""

    def _refuses(self, call: Inputs) -> bool:
        """Whether the model itself cannot be called so."""
        return not self.outputs(call)


def _batch_of(call: Inputs) -> int | None:
    """The size of the first axis of all tensors, containers included; None where they do not agree."""
    sizes = {x.shape[0] for x in tensors_in(call.values) if x.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def _of_size(call: Inputs, size: int) -> Inputs:
    return call.copied(lambda x: x[torch.arange(size, device=x.device) % x.shape[0]] if x.ndim else x.clone())


def _called(model: Any, call: Inputs) -> list[Any]:
    call = call.copied()  # a model may write into its inputs
    with torch.no_grad():
        return [x for x in pytree.tree_leaves(model(*call.args, **call.kwargs)) if x is not None]


def _largest_batch(exported: Any) -> int | None:
    """The largest first axis of an input for which the program holds, None where there is none."""
    for node in exported.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        size = value.shape[0] if isinstance(value, Tensor) and value.ndim else None
        limits = exported.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
        if limits is not None and limits.upper.is_Integer:  # not int_oo
            return int(limits.upper)
    return None


def _apart(exported: Any) -> float:
    """How far apart outputs may be: more where anything was computed in 16 bits, whatever the outputs are."""
    graphs = [part.graph for part in exported.graph_module.modules() if hasattr(part, "graph")]
    values = pytree.tree_leaves([node.meta.get("val") for graph in graphs for node in graph.nodes])
    short = any(isinstance(x, Tensor) and x.dtype in _16_BITS for x in values)
    return _APART_IN_16_BITS if short else _APART


def _equal(one: list[Any], other: list[Any], apart: float | None) -> bool:
    """Whether two lists of outputs are of the same shapes, and, but for rounding, of the same values.

    `apart` is the largest difference, as a fraction of the largest value; None leaves values aside.
    """
    if len(one) != len(other):
        return False
    for a, b in zip(one, other, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if apart is not None and a != b:
                return False
        elif a.shape != b.shape or (apart is not None and not _close(a, b, apart)):
            return False
    return True


def _close(a: Tensor, b: Tensor, apart: float) -> bool:
    a, b = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, b))
    finite = a[a.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=apart * largest, equal_nan=True)
