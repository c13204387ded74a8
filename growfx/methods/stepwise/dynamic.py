"""Dynamic sparse training: the number of edges stays, which edges they are changes while the network learns.

Every `update_every` steps each layer drops its worst edges and grows as many others. The methods differ in how they
score what to drop and to grow, and in whether growth is shared out anew among the layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from growfx.errors import ConfigError
from growfx.masked.layers import MaskedLayer
from growfx.methods.masks import dense_gradients
from growfx.methods.stepwise.course import Course
from growfx.methods.stepwise.exchange import apportion, exchange, finite_magnitudes, mean_of_active
from growfx.methods.stepwise.schedules import DECAYS, Clock, anneal
from growfx.methods.stepwise.sparse_start import SparseStart
from growfx.methods.unused import Use
from growfx.options import Unused, option
from growfx.selection.density import layer_counts

__all__ = ["MEST", "SET", "SNFS", "Dynamic", "RigL", "RigLSG", "RigLSM"]

_SUMS = "it shares growth out by sums over a layer's edges, whose last bits depend on the number of ranks"


def _without_updates(use: Use) -> str:
    """Why options of updates have no effect: the training is too short for one."""
    every, until = use.method.update_every, use.method.update_until
    if use.total_steps is None or Clock.until(until, use.total_steps, every).last:
        return ""
    return (
        f"as a training of {use.total_steps} steps has no update: one is due after every {every} steps "
        f"(`update_every`), before {until:g} of all steps (`update_until`)"
    )


def _of_updates(*options: str) -> Unused:
    return Unused(options, _without_updates, says=("changes no mask", "change no mask"))


@dataclass(frozen=True)
class Dynamic(SparseStart):
    """What the methods share: clock, counts, and the exchange of edges after an optimizer step.

    A layer of n edges drops ``floor(rate * n)`` of them, those of smallest magnitude, and grows as many; an edge just
    dropped may grow again, and then keeps its value and the optimizer's state. Other new edges start at zero, with zero
    state. Layers are treated one by one, so the edges of each layer stay as many as they were, but where growth is
    redistributed: then only their sum does. A step whose gradients are not finite (mixed precision with a loss scale
    too large) has no update: its optimizer skips it too.

    Attributes:
        update_every: optimizer steps from update to update. A training too short for one update has none: its masks
            are those of `static`, and the trace's exploration stays at the density.
        drop_fraction: of a layer's edges, at the first step.
        update_until: fraction of all steps after which masks stay; 1 goes on to the end (In-Time Over-Parameterization,
            Liu et al., ICML 2021), but for the very last step, which nothing would train.
        decay: how the rate goes to zero until then: "cosine", "linear" or "constant".

    Deviations from google-research/rigl:
        1. the optimizer's step before an update is made; RigL's own code replaces it by the update.
        2. equal scores are ordered by seeded keys, not by noise added to the weights.
        3. starting counts are exact for the whole network, and "uniform" does not keep the first layer dense
           (`growfx.selection.density`).
        4. no update before the first step.
    """

    gradient: ClassVar[str] = "never"  # when gradients of absent edges are read: never, at updates, every step
    unused: ClassVar[tuple[Unused, ...]] = (_of_updates("update_every", "drop_fraction", "update_until", "decay"),)

    update_every: int = option(100, low=1)
    drop_fraction: float = option(0.3, low=0, high=1, open_low=True)
    update_until: float = option(0.75, low=0, high=1, open_low=True)
    decay: str = option("cosine", choices=tuple(DECAYS))

    # -- what a subclass says -------------------------------------------------------------------------------

    def _remember(self, course: Course) -> None:
        """Take note of the step just made; of every step up to the last update."""

    @abstractmethod
    def _rewire(self, course: Course) -> Mapping[str, Tensor] | None:
        """Return new masks; None where the step's gradients are of no use."""

    # -- the same for all -----------------------------------------------------------------------------------

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        return self._start_masks(course, self.density)

    def _update(self, course: Course) -> Mapping[str, Tensor] | None:
        clock = self._clock(course)
        if course.steps > clock.last:
            return None
        self._remember(course)
        masks = self._rewire(course) if clock.due(course.steps) else None
        if course.steps == clock.last:
            course.memory.clear()
        return masks

    def _wants_gradient(self, course: Course, step: int) -> bool:
        clock = self._clock(course)
        return self.gradient != "never" and (clock.due(step) if self.gradient == "updates" else step <= clock.last)

    def _clock(self, course: Course) -> Clock:
        return Clock.until(self.update_until, course.total_steps, self.update_every)

    def _rate(self, course: Course) -> float:
        """Which fraction of its edges a layer drops now."""
        return anneal(self.decay, self.drop_fraction, course.done / self.update_until)

    def _exchanged(
        self, course: Course, grow: dict[str, Tensor] | None, importance: dict[str, float] | None = None
    ) -> dict[str, Tensor]:
        """Drop by magnitude and grow by the scores `grow`; `importance` of the layers, unless all 0, redistributes."""
        rate, layers = self._rate(course), course.layers
        counts = {name: layer.nnz for name, layer in layers.items()}
        keep = {name: count - int(rate * count) for name, count in counts.items()}
        target = counts
        if importance is not None and any(importance.values()):
            room = {name: layer.numel - keep[name] for name, layer in layers.items()}
            more = apportion(sum(counts.values()) - sum(keep.values()), importance, room)
            target = {name: keep[name] + more[name] for name in layers}
        return exchange(course.masks, keep, target, _weights(course), grow, self.seed, f"after step {course.steps}")


def _weights(course: Course) -> dict[str, Tensor]:
    return finite_magnitudes(course.weights, "weights") or {}


def _active_gradients(layers: Mapping[str, MaskedLayer]) -> dict[str, Tensor]:
    """Return the gradients the optimizer used, zero at absent edges, and for layers that took no part in the step."""
    grads = {name: layer.gradient for name, layer in layers.items()}
    if layers and all(grad is None for grad in grads.values()):
        raise ConfigError(
            "no layer has a gradient; call `method.step()` after `optimizer.step()` and before `optimizer.zero_grad()`"
        )
    return {
        name: torch.zeros_like(layers[name].parameter) if grad is None else grad.detach()
        for name, grad in grads.items()
    }


def _average(course: Course, gradients: Mapping[str, Tensor], memory: float) -> None:
    """Keep the exponential moving averages of gradients in `course.memory`; what is not finite is left out."""
    for name, gradient in gradients.items():
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        kept = course.memory.get(name)
        kept = None if kept is None else kept.to(wide)  # the network may have another type or place since
        new = (1 - memory) * wide if kept is None else kept.lerp(wide, 1 - memory)
        before = torch.zeros_like(wide) if kept is None else kept
        course.memory[name] = torch.where(torch.isfinite(wide), new, before)


@dataclass(frozen=True)
class SET(Dynamic):
    """Sparse evolutionary training: growth at random (Mocanu et al., Nature Communications 2018).

    Options as in `Dynamic`. Deviations: 1. the smallest magnitudes are dropped regardless of sign; the original drops
    the smallest positive and the largest negative weights apart. 2. counts are exact; later codes grow each edge with a
    probability. 3. the output layer is sparse as any other; exclude it in `growfx.wrap` to keep it dense.
    """

    name: ClassVar[str] = "set"
    needs_whole: ClassVar[str] = ""

    def _rewire(self, course: Course) -> Mapping[str, Tensor]:
        return self._exchanged(course, None)


@dataclass(frozen=True)
class RigL(Dynamic):
    """Growth where the gradient of absent edges is largest (Evci et al., Rigging the Lottery, ICML 2020).

    Options and deviations as in `Dynamic`; the gradient is that of the step just made.
    """

    name: ClassVar[str] = "rigl"
    needs_whole: ClassVar[str] = ""
    gradient: ClassVar[str] = "updates"

    def _rewire(self, course: Course) -> Mapping[str, Tensor] | None:
        grow = finite_magnitudes(dense_gradients(course.net, course.layers))
        return None if grow is None else self._exchanged(course, grow)


@dataclass(frozen=True)
class RigLSG(Dynamic):
    """RigL with growth redistributed among the layers by gradient (Sundar & Dwaraknath, ReScience C 2021).

    A layer's share of all edges grown is the mean magnitude of the gradient over its edges before the drop. Deviations:
    those of `Dynamic`; 5. a layer may become full (the authors stop at 99 %), the sum is exact at once, and the rates
    of dense layers are not adjusted.
    """

    name: ClassVar[str] = "rigl-sg"
    needs_whole: ClassVar[str] = _SUMS
    gradient: ClassVar[str] = "updates"

    def _rewire(self, course: Course) -> Mapping[str, Tensor] | None:
        grow = finite_magnitudes(dense_gradients(course.net, course.layers))
        return None if grow is None else self._exchanged(course, grow, mean_of_active(grow, course.masks))


@dataclass(frozen=True)
class RigLSM(Dynamic):
    """RigL with growth redistributed among the layers by momentum (Sundar & Dwaraknath, ReScience C 2021).

    As `RigLSG`, by the mean magnitude of a moving average of the gradients of the edges present. Deviations: those of
    `RigLSG`; 6. the average is the method's own, as optimizers name and scale theirs differently and some have none; it
    has no weight decay in it, and costs memory of the size of the weights until the last update.

    Attributes:
        averaging: how much of the moving average a step keeps.
    """

    name: ClassVar[str] = "rigl-sm"
    needs_whole: ClassVar[str] = _SUMS
    gradient: ClassVar[str] = "updates"
    unused: ClassVar[tuple[Unused, ...]] = (_of_updates("averaging"),)

    averaging: float = option(0.9, low=0, high=1, open_high=True)

    def _remember(self, course: Course) -> None:
        _average(course, _active_gradients(course.layers), self.averaging)

    def _rewire(self, course: Course) -> Mapping[str, Tensor] | None:
        grow = finite_magnitudes(dense_gradients(course.net, course.layers))
        if grow is None:
            return None
        masks = self._exchanged(course, grow, mean_of_active(course.memory, course.masks))
        for name, mask in masks.items():
            course.memory[name].masked_fill_(~mask, 0.0)  # as the optimizer's state
        return masks


@dataclass(frozen=True)
class SNFS(Dynamic):
    """Sparse networks from scratch: growth and redistribution by momentum (Dettmers & Zettlemoyer, 2019).

    Momentum is a moving average of the gradients of all edges, present or absent, so every step until the last update
    costs a dense gradient, and memory of the size of the weights. Edges grow where its magnitude is largest; a layer's
    share of them is its mean magnitude over the edges before the drop. Deviations: those of `Dynamic`; 5. the average
    is the method's own, not the optimizer's, so that optimizers without momentum serve too; 6. updates by steps, not
    once an epoch, and `drop_fraction` 0.3, not 0.5, as the other methods here; 7. full layers and rates as in `RigLSG`.

    Attributes:
        averaging: how much of the moving average a step keeps.
    """

    name: ClassVar[str] = "snfs"
    needs_whole: ClassVar[str] = _SUMS
    gradient: ClassVar[str] = "steps"
    unused: ClassVar[tuple[Unused, ...]] = (_of_updates("averaging"),)

    averaging: float = option(0.9, low=0, high=1, open_high=True)

    def _remember(self, course: Course) -> None:
        _average(course, dense_gradients(course.net, course.layers), self.averaging)

    def _rewire(self, course: Course) -> Mapping[str, Tensor]:
        grow = {name: value.abs() for name, value in course.memory.items()}
        return self._exchanged(course, grow, mean_of_active(grow, course.masks))


@dataclass(frozen=True)
class MEST(Dynamic):
    """Memory-economic sparse training with a soft memory bound, EM&S (Yuan et al., MEST, NeurIPS 2021).

    An edge's worth is ``|weight| + gradient_weight * |gradient|``; growth is at random, so no gradient of an absent
    edge is ever needed. An update drops each layer to its share of `density`, less the rate of `drop_fraction`, and
    grows it to its share of `density` plus an excess, which shrinks with the rate and is gone at the last update. The
    excess ends where every edge is present. Deviations: those of `Dynamic`; 5. layer shares follow `distribution`
    (theirs come from lists by hand), and the excess shrinks by `decay` rather than in two steps. 6. after a step whose
    gradients are not finite edges are dropped by magnitude alone, as the density of the last update must be met.

    Attributes:
        gradient_weight: of the gradient's magnitude in an edge's worth; 0 drops by magnitude.
        excess: density by which the first updates pass `density`; 0 is the hard bound, EM.
    """

    name: ClassVar[str] = "mest"
    needs_whole: ClassVar[str] = ""
    unused: ClassVar[tuple[Unused, ...]] = (_of_updates("gradient_weight", "excess"),)

    gradient_weight: float = option(0.01, low=0)
    excess: float = option(0.05, low=0, high=1)

    def _rewire(self, course: Course) -> Mapping[str, Tensor]:
        rate = self._rate(course)
        last = course.steps == self._clock(course).last
        excess = 0.0 if last else self.excess * rate / self.drop_fraction
        base, target = self._counts(course, 0.0), self._counts(course, excess)
        keep = {
            name: min(layer.nnz, target[name], base[name] - int(rate * base[name]))
            for name, layer in course.layers.items()
        }
        stream = f"after step {course.steps}"
        return exchange(course.masks, keep, target, self._worth(course), None, self.seed, stream)

    def _counts(self, course: Course, more: float) -> dict[str, int]:
        """Return each layer's share of `density` and `more`: by `distribution`, or by the edges of given masks."""
        if self.masks != "given":
            share = course.edges_at(min(self._density(course) + more, 1.0)) / course.numel
            return layer_counts(course.shapes, share, self.distribution)
        layers = course.layers
        base = {name: course.start["counts"][name] for name in layers}
        room = {name: layer.numel - base[name] for name, layer in layers.items()}
        extra = min(round(more * course.scope.numel), sum(room.values()))
        added = apportion(extra, {name: float(count) for name, count in base.items()}, room)
        return {name: base[name] + added[name] for name in layers}

    def _worth(self, course: Course) -> dict[str, Tensor]:
        worth = _weights(course)
        if self.gradient_weight:
            gradients = finite_magnitudes(_active_gradients(course.layers)) or {}
            for name, gradient in gradients.items():
                worth[name] = worth[name] + self.gradient_weight * gradient
        return worth
