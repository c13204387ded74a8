"""Gradients that are masked where they are produced, and what tells one that was changed since."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = [
    "GradientMark",
    "MarkGradient",
    "MaskGradient",
    "MaskOwnGradient",
    "compiled_weight",
    "mask_gradient",
    "mask_in_place",
    "obeys",
]

_SAME_SIZE_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 2**19  # elements, 2 MiB in float32


def mask_in_place(values: Tensor, mask: Tensor) -> Tensor:
    """Set `values` to exactly +0.0 where `mask` (bool, the same shape) is False, faster than `masked_fill_`.

    Working on the bits also turns an inf or nan outside the mask into zero, which a product with 0 would not.
    """
    if values.is_complex():
        return values.masked_fill_(~mask, 0)
    bits = values.view(_SAME_SIZE_INT[values.dtype.itemsize])
    parts = _parts(bits, mask)
    if parts is None:
        bits.bitwise_and_(mask.view(torch.int8).neg())  # a GPU widens the smaller type on the way
        return values
    for part, allowed, wide in parts:
        part.bitwise_and_(wide.copy_(allowed).neg_())
    return values


def obeys(values: Tensor, mask: Tensor) -> bool:
    """Whether `values` are zero, of either sign, where `mask` (bool, the same shape) is False.

    Reads values and mask once, several times faster than comparisons. Not on a CPU the answer is False: waiting for
    it would take longer than masking.
    """
    if values.device.type != "cpu":
        return False
    if values.is_complex():
        return not bool((values.masked_fill(mask, 0) != 0).any())
    bits = values.view(_SAME_SIZE_INT[values.dtype.itemsize])
    parts = _parts(bits, mask)
    if parts is None:
        return not bool((values.masked_fill(mask, 0) != 0).any())
    if values.numel() == 0:
        return True
    negative_zero = torch.iinfo(bits.dtype).min
    for part, allowed, wide in parts:
        least, most = torch.aminmax(wide.copy_(allowed).sub_(1).bitwise_and_(part))
        if bool(most) or (bool(least) and not _only_zeros(wide, negative_zero)):
            return False
    return True


def _only_zeros(bits: Tensor, negative_zero: int) -> bool:
    return bool(((bits == 0) | (bits == negative_zero)).all())


def mask_gradient(gradient: Tensor, mask: Tensor) -> Tensor:
    """`mask_in_place` of a gradient, one of an embedding with sparse gradients included."""
    if not gradient.is_sparse:
        return mask_in_place(gradient, mask)
    coalesced = gradient.coalesce()
    kept = torch.where(mask[coalesced.indices()[0]], coalesced.values(), 0)
    return gradient.copy_(torch.sparse_coo_tensor(coalesced.indices(), kept, gradient.shape, is_coalesced=True))


def _parts(bits: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]] | None:
    """Parts of both that stay in the cache, and memory for as wide a mask; None where they are not laid out alike.

    The wider mask needs memory: a part at a time takes no longer than reading as wide a mask from memory would.
    """
    flat, allowed = _flat(bits), _flat(mask)
    if bits.device.type != "cpu" or flat is None or allowed is None or bits.is_contiguous() != mask.is_contiguous():
        return None
    wide, allowed = flat.new_empty(min(_PART, flat.numel())), allowed.view(torch.int8)
    if flat.numel() <= _PART:  # splitting takes longer than the work on a small layer
        return iter([(flat, allowed, wide)])
    pairs = zip(flat.split(_PART), allowed.split(_PART), strict=True)
    return ((part, own, wide[: part.shape[0]]) for part, own in pairs)


def _flat(tensor: Tensor) -> Tensor | None:
    """The elements as they lie in memory; None where they do not lie one after another."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).view(-1)
    return None


class GradientMark:
    """Which tensor, at which version, a backward pass has just masked.

    autograd hands a parameter's only gradient on unchanged; one that was added to, clipped, averaged over ranks or made
    by others is another tensor or version, and nothing is known of it.
    """

    def __init__(self) -> None:
        # Weak, so that no gradient is kept, yet the identity of one that is gone is never another's.
        self._storage: StorageWeakRef | None = None
        self._version = -1

    def put(self, gradient: Tensor) -> None:
        """Note that `gradient` is masked in its current state."""
        self._storage, self._version = StorageWeakRef(gradient.untyped_storage()), gradient._version

    def is_of(self, gradient: Tensor) -> bool:
        """Whether `gradient` is just what was noted."""
        return (
            self._version == gradient._version
            and self._storage is not None
            and self._storage.cdata == gradient.untyped_storage()._cdata
        )


class MarkGradient(torch.autograd.Function):
    """The weight itself; its gradient, which is masked already, noted as such.

    It is masked as the forward saw the mask: where that was written to since, edges that are gone are left out.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, mark: GradientMark) -> Tensor:  # noqa: D102 - of autograd
        ctx.mask, ctx.mark, ctx.version = mask, mark, mask._version
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102 - of autograd
        if ctx.mask._version != ctx.version:
            return MaskGradient.backward(ctx, *grads)
        ctx.mark.put(grads[0])
        return grads[0], None, None


class MaskGradient(torch.autograd.Function):
    """The weight unchanged; its gradient masked, in a copy."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, mark: GradientMark) -> Tensor:  # noqa: D102 - of autograd
        ctx.mask, ctx.mark = mask, mark
        return weight.detach()  # not a view: autograd would refuse it once the parameter was masked in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102 - of autograd
        (grad,) = grads
        if torch.is_grad_enabled():  # a second derivative is wanted
            return torch.where(ctx.mask, grad, 0), None, None
        return _masked(grad.clone(), ctx), None, None


class MaskOwnGradient(MaskGradient):
    """The same for a convolution's or linear layer's own use: its gradient belongs to nobody else, so it is masked in
    place. One output serves all steps.
    """

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102 - of autograd
        if torch.is_grad_enabled():
            return MaskGradient.backward(ctx, *grads)
        return _masked(grads[0], ctx), None, None


def _masked(gradient: Tensor, ctx: Any) -> Tensor:
    mask_in_place(gradient, ctx.mask)
    ctx.mark.put(gradient)
    return gradient


class _CompiledWeight(torch.autograd.Function):
    generate_vmap_rule = True  # within `torch.func.grad` and `vmap`, too

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, collects: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        mask, collects = ctx.saved_tensors
        return torch.where(mask | collects, grads[0], 0), None, None


def compiled_weight(weight: Tensor, mask: Tensor, collects: Tensor) -> Tensor:
    """``where(mask, weight, 0)`` with a masked gradient, or the whole one while the bool scalar `collects` is True.

    A value decides, not a branch, so that neither another mask nor a step that collects gradients compiles anew.
    """
    return cast(Tensor, _CompiledWeight.apply(weight, mask, collects))
