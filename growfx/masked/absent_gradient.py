"""Gradients of absent edges that a method reads, kept apart from `.grad` as soon as a backward pass has added to it.

Between a backward pass and the optimizer's step, a loop clips by the norm of all gradients, logs them, or divides them
by the scale of the loss. Absent edges must not count in any of that, but what is done to the gradients of present edges
has to be done to theirs as well: they are multiplied by what the largest present gradient was multiplied by since.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from growfx.distributed import ranks
from growfx.distributed.sharded import is_sharded

__all__ = ["AbsentGradient", "factor_between"]

_NO_FACTOR = 1e-4  # as far from 1: sums in another order


class AbsentGradient:
    """The gradient of a layer's absent edges, over all backward passes since that of its parameter was discarded.

    While `.grad` holds no gradient of a present edge, or one that is not finite (which a loss scaler must see, and
    which tells no factor), absent edges stay in it until the optimizer's step.

    Attributes:
        mask: asked for the mask (bool, the parameter's shape); None: the layer collects no gradients.
    """

    def __init__(self, parameter: nn.Parameter, mask: Callable[[], Tensor | None]) -> None:
        self.mask = mask
        self._parameter = weakref.ref(parameter)  # which holds this, by its hooks, where no collector finds a cycle
        self._kept: Tensor | None = None
        self._exchange: bool | None = None  # as `growfx.distributed.ranks.exchange` said in the forward
        self._place, self._value = torch.zeros(0), torch.zeros(0)  # of the largest present gradient, then
        self._hooks = (
            parameter.register_hook(self._before_adding),
            parameter.register_post_accumulate_grad_hook(self._after_adding),
        )

    def watches(self, parameter: nn.Parameter) -> bool:
        """Whether it is the gradient of `parameter` that is watched."""
        return self._parameter() is parameter

    def forward_runs(self) -> None:
        """Find out whether ranks exchange the gradient that this forward will have."""
        if torch._C._current_graph_task_id() == -1:  # else it is run anew, within a backward pass
            self._exchange = ranks.exchange()

    def close(self) -> None:
        """Watch no longer; what is kept is forgotten."""
        for hook in self._hooks:
            hook.remove()
        self._kept = None

    def take(self) -> Tensor | None:
        """Return what is kept, in the shape of the weight and zero at present edges, and keep it no longer.

        None where nothing is kept, or the parameter's gradient was discarded since.
        """
        self._follow()
        kept, self._kept = self._kept, None
        return kept

    def _before_adding(self, _: Tensor) -> None:
        self._follow()

    def _gradient(self) -> Tensor | None:
        parameter = self._parameter()
        return None if parameter is None else parameter.grad

    def _follow(self) -> None:
        """Do to what is kept what was done to the parameter's gradient since."""
        gradient, mask = self._gradient(), self.mask()
        if self._kept is None:
            return
        if gradient is None or mask is None or gradient.is_sparse or gradient.shape != self._kept.shape:
            self._kept = None
            return
        value = gradient.detach().take(self._place)
        factor = torch.where(value == 0, value, value / self._value)  # zero after a value that was not finite, too
        # Else the step will be left out and the gradient discarded, or the edge is gone, and its gradient with it.
        known = factor.isfinite() & mask.take(self._place)
        self._kept.mul_(torch.where(known, factor, 1))  # by zero where all gradients were set to zero
        self._value = torch.where(known, _not_zero(value), self._value)

    def _after_adding(self, _: Tensor) -> None:
        if ranks.world_size() == 1:
            self._keep()
        elif self._exchange:  # then absent edges, too, have the mean over ranks
            _at_the_end_of_backward(self._keep)
        # Else more backward passes come before ranks exchange gradients, or they do it by hand: those of all edges.

    @staticmethod
    def _can_be_kept(gradient: Tensor) -> bool:
        return not (gradient.is_sparse or gradient.is_meta or gradient.requires_grad or is_sharded(gradient))

    @torch.no_grad()
    def _keep(self) -> None:
        """Move the gradient of absent edges here; on a GPU without waiting for it."""
        mask, gradient = self.mask(), self._gradient()
        if mask is None or gradient is None or not gradient.numel():
            return
        if not self._can_be_kept(gradient):
            self._leave(gradient)
            return
        gradient = gradient.detach()
        absent = gradient.masked_fill(mask, 0)
        place = (gradient - absent).abs().flatten().argmax()
        value = gradient.take(place)
        moves = (value != 0) & mask.take(place) & gradient.isfinite().all()
        if moves.is_cpu and not bool(moves):
            self._leave(gradient)
            return
        gradient.masked_fill_(~mask & moves, 0)
        absent.masked_fill_(~moves, 0)
        self._kept = absent if self._kept is None else self._kept.add_(absent)
        self._place, self._value = place, _not_zero(value)

    def _leave(self, gradient: Tensor) -> None:
        """Keep what is kept of earlier passes of the window as it is: adding to the gradient is no factor."""
        if self._kept is not None:
            self._value = _not_zero(gradient.detach().take(self._place))


def _at_the_end_of_backward(call: Callable[[], None]) -> None:
    """Call `call` when the backward pass is over, after what others have asked for by now (the exchange of ranks)."""
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(call))


def _not_zero(value: Tensor) -> Tensor:
    return torch.where(value == 0, 1, value)


def factor_between(before: Tensor, after: Tensor) -> float:
    """Return what `before` was multiplied by to become `after`; 1 where that cannot be told."""
    if not before.numel():
        return 1.0
    top = before.abs().max()  # a square of what a loss scaler multiplied may be too large, of others too small
    before, after = before / top, after / top
    square = float((before.conj() * before).sum().real)
    factor = float((before.conj() * after).sum().real) / square if square > 0 else 1.0
    known = abs(factor) < float("inf") and abs(factor - 1.0) > _NO_FACTOR
    return factor if known else 1.0
