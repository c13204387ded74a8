"""The kernel of one masked layer: when its own forward may be computed over active entries alone, and how."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from growfx.masked.layers import MaskedLayer
from growfx.runtime.train.choice import Chooser
from growfx.runtime.train.entries import LIMIT, Entries, Geometry, geometry_of, product
from growfx.runtime.train.flow import hand_over, is_flowing, note_dense, note_rows, rows_may_stay

__all__ = ["LayerKernel"]


class LayerKernel:
    """What `use_kernels` gives a masked layer: called with its input, returns the output or None for dense kernels.

    Nothing is remembered that could go stale: the entries are compared with the mask at each use and made anew when it
    has changed, values are read from the parameter, and what was chosen holds for one shape of inputs and for
    densities within a fifth.

    Attributes:
        name: of the layer.
        readers: of a linear layer, the linear layers that read its output, which stays within a flow as the kernel lays
            it out where all of them read it so; None where others may read it.
        never: why the layer never has a sparse kernel; "" where it can.
        reason: why the last call took the kernel that it took.
        took_sparse: whether the last call took the sparse kernel.
    """

    def __init__(
        self, name: str, layer: MaskedLayer, chooser: Chooser, *, readers: Collection[str] | None = None
    ) -> None:
        self.name, self.chooser, self.readers = name, chooser, readers
        found = geometry_of(layer)
        self.geometry = found if isinstance(found, Geometry) else Geometry((), (), (), (), ())
        self.never = found if isinstance(found, str) else _refusal(layer)
        self.reason = self.never or "it has not been called"
        self.took_sparse = False
        self._entries: Entries | None = None
        self._bits: Tensor | None = None  # of the mask that entries of values are of
        # Where dense kernels were chosen, the mask need not be read again as long as nothing is known to have changed.
        self._dense_at: tuple[Any, ...] = ()
        self._dense_reason = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy computes dense until `use_kernels` is called on it

    def __reduce__(self) -> Any:
        return type(None), ()

    def __call__(self, layer: MaskedLayer, x: Tensor) -> Tensor | None:
        """The output over active entries alone, with its gradients; None: dense kernels are to compute it."""
        if not self.geometry.kernel:
            return self._computed(layer, x)
        # A flow looks at every question about a tensor, and there are many here.
        hand_over(x)
        with torch._C.DisableTorchFunction():
            return self._computed(layer, x)

    def _computed(self, layer: MaskedLayer, x: Tensor) -> Tensor | None:
        self.took_sparse = False
        # What would refuse sparse kernels now leads to dense ones too: of layers that take these nothing more is asked.
        situation = () if self.never or type(x) is not Tensor else self._situation(layer, x)
        if situation and situation == self._dense_at:
            self.reason = self._dense_reason
            note_dense()
            return None
        self.reason = self.never or self._reason_of_call(layer, x)
        if self.reason:
            return None
        with torch._C.DisableTorchFunction():
            half = torch.is_autocast_enabled("cpu")
            images = x.to(torch.bfloat16) if half else x
            out_size = self._out_size(images)
            if out_size is None:
                self.reason = f"its input has the shape {tuple(x.shape)}"
                return None
            entries, inner = self._entries_for(layer, out_size), self._keeps_inner(images)
            rows, images_flow = inner and not self.geometry.kernel, inner and bool(self.geometry.kernel)
            kernel, self.reason = self.chooser.choose(
                self.name, layer, self.geometry, entries, images, out_size, images_flow
            )
            self.took_sparse = kernel == "sparse"
            if kernel == "dense":
                self._dense_at, self._dense_reason = situation, self.reason
                note_dense()
                return None
            bias: Any = layer.bias
            weight = layer.weight_of_entries() if layer.present is None else layer.present.of_entries()
            panels = kernel == "panels"
            out = product(images, weight, bias, entries, self.geometry, out_size, inner=inner, panels=panels)
            if rows:
                note_rows(out)
            return out

    def _situation(self, layer: MaskedLayer, x: Tensor) -> tuple[Any, ...]:
        """What a choice depends on, as far as it can be told without reading the mask."""
        gradient = torch.is_grad_enabled(), x.requires_grad, layer.trained.requires_grad
        where = torch.get_num_threads(), is_flowing(), torch.is_autocast_enabled("cpu"), id(self.chooser.known)
        return (layer.mask_marker(), x.shape, x.dtype, layer.present is None, *gradient, *where)

    def _keeps_inner(self, x: Tensor) -> bool:
        """Whether the output is to stay as the kernel lays it out: with the batch, or all rows, innermost."""
        if x.dtype != torch.float32:
            return False
        if self.geometry.kernel:
            return is_flowing()
        return self.readers is not None and rows_may_stay() and self.chooser.feeds_rows(self.readers)

    def _entries_for(self, layer: MaskedLayer, out_size: list[int]) -> Entries:
        """The entries of the current mask, for outputs of `out_size`: checked or made anew."""
        if layer.present is not None:
            return self._entries_of_values(layer, out_size)
        strides, taps_read = layer.parameter.stride(), self.geometry.taps_read(out_size)
        if self._entries is None or not self._entries.are_of(layer.mask, strides, taps_read=taps_read):
            with torch.inference_mode(False):  # a backward pass may use them later
                self._entries = Entries.of(layer.mask, strides, self.geometry, out_size)
        return self._entries

    def _entries_of_values(self, layer: MaskedLayer, out_size: list[int]) -> Entries:
        """The same for a layer that keeps values of present edges, which know whether the mask is another one."""
        present, entries = layer.present, self._entries
        assert present is not None
        present.follow(layer.mask)
        known = entries is not None and entries.of_values and self._bits is present.bits
        if entries is None or not known or entries.taps_read != self.geometry.taps_read(out_size):
            self._entries = None  # before there are others
            with torch.inference_mode(False):
                entries = self._entries = Entries.of_present(layer.mask, self.geometry, out_size)
            self._bits = present.bits
        return entries

    def entries_of(self, layer: MaskedLayer) -> Entries | None:
        """The entries of the whole weight that the last call used; None where the mask has changed since."""
        entries = self._entries
        if layer.present is not None:
            return None
        strides = layer.parameter.stride()
        known = entries is not None and entries.are_of(layer.mask, strides, taps_read=entries.taps_read)
        return entries if known else None

    def _out_size(self, x: Tensor) -> list[int] | None:
        """Sizes of the output beside batch and channels; None where the input does not fit."""
        kernel = self.geometry.kernel
        if not kernel:
            return [] if x.dim() > 0 and x.numel() else None
        if x.dim() != len(kernel) + 2 or not x.numel():
            return None
        size = self.geometry.out_size(tuple(x.shape[2:]))
        return size if min(size) > 0 else None

    def _reason_of_call(self, layer: MaskedLayer, x: Tensor) -> str:
        """Why this call takes dense kernels; "" where it may take sparse ones."""
        reason = layer.refuses_entries()
        if reason:
            return reason
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return f"its input is a {type(x).__name__}"
        if not x.is_cpu:
            return f"its input is on {x.device}"
        if forward_ad._current_level >= 0:
            return "a forward derivative is wanted"
        weight, dtype = layer.mask, layer.trained.dtype
        channel = 1 if self.geometry.kernel else -1
        if x.dim() <= len(self.geometry.kernel) or x.shape[channel] != weight.shape[1] * self.geometry.groups:
            return f"its input has the shape {tuple(x.shape)}"
        if torch.is_autocast_enabled("cpu"):
            if torch.get_autocast_dtype("cpu") != torch.bfloat16:
                return f"autocast computes in {torch.get_autocast_dtype('cpu')}"
        elif x.dtype != torch.float32:
            return f"its input is {x.dtype}"
        if x.dtype not in (torch.float32, torch.bfloat16):
            return f"its input is {x.dtype}"
        if dtype != torch.float32:
            return f"its weight is {dtype}"
        if max(x.numel(), x.numel() // max(x.shape[channel], 1) * weight.shape[0]) * 2 > LIMIT:
            return "its input is too large for 32-bit offsets"
        return ""


def _refusal(layer: MaskedLayer) -> str:
    """Why the current layer never has a sparse kernel here; "" where it can."""
    weight = layer.parameter
    if not layer.calls_kernel:
        return f"`{layer.twin_of.__name__}` has its own forward"
    if layer.trained.device.type != "cpu":
        return f"its weight is on {weight.device}"
    if weight.dtype != torch.float32:
        return f"its weight is {weight.dtype}"
    if weight.numel() > LIMIT:
        return "its weight is too large for 32-bit offsets"
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if not weight.is_contiguous() and not (
        weight.dim() in formats and weight.is_contiguous(memory_format=formats[weight.dim()])
    ):
        return "its weight does not lie in one piece"
    return ""
