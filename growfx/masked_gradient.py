"""Gradients that are masked where they are produced, and what tells one that was changed since."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["GradientMark", "MaskGradient", "MaskOwnGradient", "keep_bits", "mask_in_place"]

_SAME_SIZE_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 2**18  # elements, 1 MiB in float32


def keep_bits(mask: Tensor) -> Tensor:
    """All bits set where `mask` is true, none elsewhere: -1 and 0 in int8, the mask's shape and layout."""
    return mask.view(torch.int8).neg()


def mask_in_place(values: Tensor, keep: Tensor) -> Tensor:
    """Set `values` to exactly +0.0 where `keep` (as `keep_bits` makes it) has no bits, faster than `masked_fill_`.

    A bool mask serves as `keep` too, where memory for its bits is not to be kept.

    Working on the bits also turns an inf or nan outside the mask into zero, which a product with 0 would not.
    """
    if keep.dtype == torch.bool:
        keep = keep_bits(keep)
    bits = values.view(_SAME_SIZE_INT[values.dtype.itemsize])
    flat, kept = _flat(bits), _flat(keep)
    if bits.device.type != "cpu" or flat is None or kept is None or bits.is_contiguous() != keep.is_contiguous():
        bits.bitwise_and_(keep)  # a GPU widens the smaller type on the way
        return values
    # On a CPU the wider type needs memory: a part at a time, which stays in the cache. That takes no longer than
    # reading as wide a mask from memory would.
    wide = torch.empty(min(_PART, flat.numel()), dtype=bits.dtype)
    for part, own in zip(flat.split(_PART), kept.split(_PART), strict=True):
        part.bitwise_and_(wide[: len(part)].copy_(own))
    return values


def _flat(tensor: Tensor) -> Tensor | None:
    """The elements as they lie in memory; None where they do not lie one after another."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).view(-1)
    return None


class GradientMark:
    """Which tensor, at which version, a backward pass has just masked.

    autograd hands a parameter's only gradient on as it is; one that was added to, clipped, averaged over ranks or made
    by others is another tensor or version, and nothing is known of it.
    """

    def __init__(self) -> None:
        # Weak, so that no gradient is kept, yet the identity of one that is gone is never another's.
        self._storage: StorageWeakRef | None = None
        self._version = -1

    def put(self, gradient: Tensor) -> None:
        """Note that `gradient` is masked as it is now."""
        self._storage, self._version = StorageWeakRef(gradient.untyped_storage()), gradient._version

    def is_of(self, gradient: Tensor) -> bool:
        """Whether `gradient` is just what was noted."""
        return (
            self._version == gradient._version
            and self._storage is not None
            and self._storage.cdata == gradient.untyped_storage()._cdata
        )


class MaskGradient(torch.autograd.Function):
    """The weight as it is; its gradient masked, in a copy."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: Tensor, mark: GradientMark) -> Tensor:  # noqa: D102 - of autograd
        ctx.keep, ctx.mark = keep, mark
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102 - of autograd
        (grad,) = grads
        if torch.is_grad_enabled():  # a second derivative is wanted
            return torch.where(ctx.keep.bool(), grad, 0), None, None
        return _masked(grad.clone(), ctx), None, None


class MaskOwnGradient(MaskGradient):
    """The same for a convolution's or linear layer's own use: its gradient belongs to nobody else, so it is masked in
    place; and the output is no view, so that one output serves all steps.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: Tensor, mark: GradientMark) -> Tensor:  # noqa: D102 - of autograd
        ctx.keep, ctx.mark = keep, mark
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102 - of autograd
        if torch.is_grad_enabled():
            return MaskGradient.backward(ctx, *grads)
        return _masked(grads[0], ctx), None, None


def _masked(gradient: Tensor, ctx: Any) -> Tensor:
    mask_in_place(gradient, ctx.keep)
    ctx.mark.put(gradient)
    return gradient
