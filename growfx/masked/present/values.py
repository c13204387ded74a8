"""The weight of one layer as a vector of its present edges, in the order of the mask (row by row).

What belongs to an edge moves with it: when the mask is another one, values, gradient and optimizer state of edges that
stay are kept, those of dropped edges are gone, and new edges start at zero. The whole weight is built where it is
needed and kept by nobody: not even between a forward and its backward pass, which builds it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from growfx.distributed import ranks
from growfx.errors import MaskError
from growfx.masked.absent_gradient import factor_between
from growfx.masked.mask_bits import pack, unpack
from growfx.masked.present.read_only import ReadOnlyWeight

__all__ = ["Move", "PresentValues", "on_move", "scattered"]


class Move:
    """From the edges of one mask to those of another, for vectors over them."""

    def __init__(self, old: Tensor, new: Tensor) -> None:
        self._stays, self._was_there = new[old], old[new]
        self.before, self.after = self._stays.numel(), self._was_there.numel()

    def __call__(self, vector: Tensor) -> Tensor:
        """The vector (`before`) over the new edges (`after`): zero at those that were not there."""
        moved = torch.zeros(self.after, dtype=vector.dtype, device=vector.device)
        moved[self._was_there] = vector.detach()[self._stays]
        return moved


# Called before values move, with the parameter, the move and the name of the layer: move what else belongs to the
# edges, or raise before anything is changed.
_MOVERS: list[Callable[[nn.Parameter, Move, str], None]] = []


def on_move(mover: Callable[[nn.Parameter, Move, str], None]) -> None:
    """Have `mover` called whenever the values of a layer move."""
    if mover not in _MOVERS:
        _MOVERS.append(mover)


class PresentValues:
    """What a masked layer has in the place of its weight.

    Attributes:
        name: of the layer, for errors.
        values: the parameter, (nnz).
        bits: the mask that the values belong to, packed; another object whenever that is another mask.
        averaged: whether the gradient of the values becomes the mean over ranks; that of all edges is this rank's own.
    """

    def __init__(self, name: str, weight: nn.Parameter, mask: Tensor) -> None:
        self.name = name
        self.values = nn.Parameter(weight.detach()[mask], requires_grad=weight.requires_grad)
        if weight.grad is not None:
            self.values.grad = weight.grad.detach()[mask]
        self.bits = pack(mask)
        self.averaged = False
        self._marker = _marker(mask)
        self._collected: Tensor | None = None
        self._collected_in = -1  # the backward pass that was last to add to it

    # -- the mask -----------------------------------------------------------------------------------------------------

    def follow(self, mask: Tensor, *, by_version: bool = False) -> None:
        """Let the values be those of `mask` as it is now, whoever wrote to it; reads the mask once.

        `by_version`: not where torch has taken note of no change since.

        Raises:
            ConfigError: an optimizer has state that cannot follow; nothing is changed then.
        """
        marker = _marker(mask)
        if marker == self._marker and (by_version or not mask.is_cpu):
            return  # waiting for a GPU's mask would take longer than what it is for
        bits = pack(mask)
        if not torch.equal(bits, self.bits):
            self._move(Move(unpack(self.bits, mask), mask), bits)
        self._marker = marker

    def _move(self, move: Move, bits: Tensor) -> None:
        values = self.values
        for mover in _MOVERS:
            mover(values, move, self.name)
        gradient = None if values.grad is None else move(values.grad)
        moved, values.grad = move(values), None
        # Autograd remembers the size that a parameter had for as long as a graph of then is alive (in `loss`, say), and
        # forgets it where the type is another one.
        other = torch.float32 if moved.dtype == torch.bfloat16 else torch.bfloat16
        values.data = torch.empty(0, dtype=other, device=moved.device)
        values.data = moved
        torch.autograd.graph.increment_version(values)
        values.grad = gradient
        self.bits, self._collected = bits, None

    # -- the whole weight ---------------------------------------------------------------------------------------------

    def whole(self, mask: Tensor, *, collects: bool = False) -> Tensor:
        """The weight, +0.0 outside the mask, differentiable.

        Args:
            mask: of the layer; the values follow it first.
            collects: let backward passes keep the gradient of all edges, absent ones too, for `take_collected`.
        """
        self.follow(mask)
        return cast(Tensor, _Whole.apply(self.values, self, mask, collects))

    def of_entries(self) -> Tensor:
        """The values for a kernel that reads present edges alone; their gradient is that of the forward's mask."""
        return cast(Tensor, _Values.apply(self.values, self)) if torch.is_grad_enabled() else self.values.detach()

    def read_only(self, mask: Tensor) -> Tensor:
        """The weight for readers, differentiable; what writes to it is refused."""
        return ReadOnlyWeight.of(self.whole(mask), lambda: self.whole_gradient(mask), self.name)

    def as_parameter(self, mask: Tensor) -> nn.Parameter:
        """The weight as a parameter of its own, a copy."""
        self.follow(mask)
        return nn.Parameter(scattered(self.values.detach(), mask), requires_grad=self.values.requires_grad)

    def whole_gradient(self, mask: Tensor) -> Tensor | None:
        """The gradient of the weight, zero outside the mask, a copy; None where there is none."""
        self.follow(mask)
        return None if self.values.grad is None else scattered(self.values.grad, mask)

    def take(self, weight: Tensor, mask: Tensor) -> None:
        """Take the values from a whole weight, at the edges of `mask`."""
        self.follow(mask)
        with torch.no_grad():
            self.values.copy_(weight.detach()[mask])

    @contextmanager
    def rebuilt(self, weight: Tensor, mask: Tensor) -> Generator[None]:
        """Save no whole `weight` for the backward pass within this block: it is built anew there.

        Where somebody else takes the tensors that are saved, they get it.
        """
        top = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
        if not weight.requires_grad or top(True) is not None:
            yield
            return
        memory, bits, version = weight.untyped_storage().data_ptr(), self.bits, self.values._version
        values = self.values.detach()

        def put(saved: Tensor) -> Any:
            if saved.layout != torch.strided or saved.untyped_storage().data_ptr() != memory:
                return saved
            return saved.size(), saved.stride(), saved.storage_offset()

        def get(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            self._check_unmoved(bits)
            if self.values._version != version:
                raise RuntimeError(
                    f"the values of `{self.name}` were changed in place between a forward and its backward pass; call "
                    "`backward` before the optimizer's step"
                )
            return scattered(values, self._mask_of(bits, mask)).as_strided(*kept)

        with torch.autograd.graph.saved_tensors_hooks(put, get):
            yield

    def _mask_of(self, bits: Tensor, mask: Tensor) -> Tensor:
        """The mask packed in `bits`: `mask` itself unless it has been written to."""
        if _marker(mask) == self._marker:
            return mask
        old = torch.empty_like(mask)
        return old.copy_(unpack(bits, mask))

    def _check_unmoved(self, bits: Tensor) -> None:
        if bits is not self.bits:
            raise MaskError(
                f"the mask of `{self.name}` was changed between a forward and its backward pass, and values of edges "
                'that are gone have no gradient (`storage` = "present"); call `backward` before masks are changed'
            )

    # -- gradients of absent edges ------------------------------------------------------------------------------------

    def collect(self, gradient: Tensor) -> None:
        """Add the gradient of all edges to what this and earlier backward passes gave."""
        backward_pass = torch._C._current_graph_task_id()
        if backward_pass != self._collected_in:
            self._follow_gradient()
        self._collected_in = backward_pass
        self._collected = gradient.detach().clone() if self._collected is None else self._collected.add_(gradient)

    def take_collected(self) -> Tensor | None:
        """The gradient of all edges since this was last called, None without one."""
        if self.values.grad is not None:  # else a loop may have discarded it after its step
            self._follow_gradient()
        found, self._collected = self._collected, None
        return found

    def _follow_gradient(self) -> None:
        """Do to what was collected what was done to the gradient of the values since: division by the scale of a loss,
        clipping, discarding (`zero_grad`).
        """
        found, now = self._collected, self.values.grad
        if found is None:
            return
        before = found[unpack(self.bits, found)]
        if now is None or now.shape != before.shape or (bool(before.any()) and not bool(now.any())):
            self._collected = None
        elif not self.averaged:
            found.mul_(factor_between(before, now.detach()))


class _Whole(torch.autograd.Function):
    """From the values to the whole weight; the gradient at the edges of the forward's mask."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, present: PresentValues, mask: Tensor, collects: bool) -> Tensor:
        ctx.present, ctx.mask, ctx.collects, ctx.bits = present, mask, collects, present.bits
        if collects:
            present.averaged = ranks.within_ddp()
        return scattered(values.detach(), mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        present: PresentValues = ctx.present
        present._check_unmoved(ctx.bits)
        if ctx.collects:
            present.collect(grads[0])
        return grads[0][present._mask_of(ctx.bits, ctx.mask)], None, None, None


class _Values(torch.autograd.Function):
    """The values as they are; a gradient of edges that are gone is refused."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, present: PresentValues) -> Tensor:
        ctx.present, ctx.bits = present, present.bits
        return values.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.present._check_unmoved(ctx.bits)
        return grads[0], None


def scattered(values: Tensor, mask: Tensor) -> Tensor:
    """Values (nnz) at the edges of `mask`, +0.0 elsewhere; laid out in memory as the mask, differentiable."""
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)


def _marker(mask: Tensor) -> tuple[int, int]:
    return id(mask), mask._version
