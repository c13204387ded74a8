"""Continuous sparsification: masks that are learned with the weights, soft at first, hard in the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from growfx.distributed import ranks
from growfx.masked.layers import MaskedLayer
from growfx.masked.shared import is_shared
from growfx.methods.masks import change_masks
from growfx.methods.session import Stage
from growfx.methods.staged.campaign import (
    Campaign,
    Staged,
    keep_point,
    make_dense,
    refuse_unused,
    return_to,
    step_of,
    trace_entry,
)
from growfx.options import option
from growfx.selection.choose import top
from growfx.selection.edge_keys import EdgeKeys

__all__ = ["MODES", "Continuous", "SoftMask"]

MODES = ("ticket", "prune")


class SoftMask:
    """A layer's gate: ``weight * sigmoid(temperature * scores) / sigmoid(initial)``.

    A deep copy gets its own scores. The scores stay on the device they were made on.

    Attributes:
        scores: float32 leaf of the weight's shape, all `initial` at first.
        temperature: of the sigmoid; the larger, the nearer to a step at 0.
        scale: ``1 / sigmoid(initial)``; at temperature 1 the first effective weights are the weights.
    """

    def __init__(self, weight: Tensor, initial: float):
        self.scores = torch.full(weight.shape, initial, device=weight.device, requires_grad=True)
        self.temperature = 1.0
        self.scale = 1.0 / _sigmoid(initial)

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the effective weight, in the weight's dtype; gradients reach weight and scores."""
        soft = torch.sigmoid(self.temperature * self.scores) * self.scale
        return weight * soft.to(weight.dtype)

    def penalise(self, penalty: float) -> None:
        """Add the gradient of `penalty` times the sum of the scaled mask to that of the scores."""
        with torch.no_grad():
            soft = torch.sigmoid(self.temperature * self.scores)
            slope = penalty * self.scale * self.temperature * soft * (1 - soft)
            self.scores.grad = slope if self.scores.grad is None else self.scores.grad + slope

    def restart(self, temperature: float, initial: float) -> None:
        """Forget how sure the scores were of what they kept: ``min(temperature * scores, initial)``."""
        with torch.no_grad():
            self.scores.mul_(temperature).clamp_(max=initial)


@dataclass
class _Search:
    """The gates of a search, by layer, and their optimizer."""

    gates: dict[str, SoftMask]
    optimizer: torch.optim.SGD

    @classmethod
    def over(cls, gates: dict[str, SoftMask]) -> _Search:
        scores = [gate.scores for gate in gates.values()]
        return cls(gates, torch.optim.SGD(scores, lr=0.0, momentum=0.9, nesterov=True))

    def step(self, rate: float, penalty: float, shared: bool) -> None:
        if shared:  # no parameters of the network: nobody else reduces their gradients
            ranks.average([gate.scores.grad for gate in self.gates.values() if gate.scores.grad is not None])
        for gate in self.gates.values():
            gate.penalise(penalty)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def scores(self) -> dict[str, Tensor]:
        return {name: gate.scores.detach() for name, gate in self.gates.items()}


@dataclass(frozen=True)
class Continuous(Staged):
    """Continuous sparsification (Savarese, Silva & Maire, Winning the Lottery with Continuous Sparsification, NeurIPS
    2020).

    In a search the layers that paths cross have all their edges and compute with ``w * sigmoid(b * s) / sigmoid(s0)``:
    every weight w has a score s, s0 at first, trained with it (float32, SGD with Nesterov momentum 0.9, no weight
    decay, no clipping). The temperature b is 1 in the first epoch and rises geometrically, once an epoch, to exactly
    `final_temperature` in the last (also when that is the first). Between rounds ``s <- min(b * s, s0)`` with the b of
    the round that ended: what was kept starts anew, what was suppressed stays so; weights go on. Each round has the
    run's whole schedule and starts with fresh optimizers. After the last one edges with s > 0 stay, and the final
    training of the run's length has hard masks.

    The density is an outcome, governed by `initial_mask` and `penalty`, unless `density` is given. A layer, even the
    whole network, may lose all its edges. The trace has one entry a round, with the edges of positive score and the
    accuracy of the soft network, and one of the final training, whose network is hard. A search costs as much as dense
    training.

    Attributes:
        initial_mask: s0; the lower, the sparser.
        penalty: times the sum of all ``sigmoid(b * s) / sigmoid(s0)``, added to the loss; no mean, so it weighs more
            in a larger network.
        final_temperature: b of the last epoch of each round.
        mask_lr: largest learning rate of the scores; over the steps it goes as the weights' rate does.
        rounds: None is 3 for a ticket and 1 for pruning.
        search_epochs: length of a round; None is that of the run.
        mode: "ticket" puts everything but the masks back to where it was after `rewind_epochs` of the first round and
            trains with the whole schedule; "prune" keeps what the search has trained and fine-tunes it.
        rewind_epochs: of a ticket; may be a fraction, 0 goes back to the initial network.
        finetune_lr: of pruning: first, and largest, learning rate of the final training, as a fraction of the run's.
        density: None, or the density of all masked layers together: the edges of largest score stay, as many as that.
        seed: of ties, with `density`.

    Deviations from the paper and its code:
        1. all masked layers that paths cross take part; the code leaves classifier and shortcuts dense.
        2. nothing stays on the layers: the factor ``1 / sigmoid(s0)`` that the code keeps in front of hard masks is
           multiplied into the weights of "prune", and left out of a "ticket", whose masks had barely moved from it at
           `rewind_epochs`. For weights followed by a norm this is the same network trained at the same effective rate.
        3. between rounds the b of the end counts, as in the paper; the code sets it to 1 first.
        4. an epoch's accuracy is measured at the temperature of the next one; the last epoch's at its own.
        5. schedule, weight decay and optimizer of the weights are the run's.
        6. `density`, for comparisons at equal density.
    """

    name: ClassVar[str] = "continuous"
    stages: ClassVar[tuple[str, ...] | None] = ("search", "final")
    trains_absent: ClassVar[str] = "trains all of them by soft masks"

    initial_mask: float = option(0.0, low=-10, high=10)
    penalty: float = option(1e-8, low=0)
    final_temperature: float = option(200.0, low=1)
    mask_lr: float = option(0.1, low=0, open_low=True)
    rounds: int | None = option(None, low=1, unset="3 for a ticket, 1 for pruning")
    search_epochs: int | None = option(None, low=1, unset="epochs of the run")
    mode: str = option("ticket", choices=MODES)
    rewind_epochs: float = option(2.0, low=0)
    finetune_lr: float = option(0.1, low=0, high=1, open_low=True)
    density: float | None = option(None, low=0, high=1, open_low=True, unset="an outcome")
    seed: int = option(0, low=0, high=2**63 - 1)

    def _check(self) -> None:
        other = "finetune_lr" if self.mode == "ticket" else "rewind_epochs"
        refuse_unused(self, other, f"`mode` = {self.mode!r}")

    # -- stages ---------------------------------------------------------------------------------------------

    def _plan(self, course: Campaign) -> list[Stage]:
        epochs = course.run.options.epochs
        if self.density is not None:
            course.edges_at(self.density)
        self._rewind_step(course)
        rounds = self.rounds or (3 if self.mode == "ticket" else 1)
        searches = [Stage("search", self.search_epochs or epochs, number) for number in range(rounds)]
        final = Stage("final", epochs)
        if self.mode == "prune":
            final = Stage("final", epochs, peak=self.finetune_lr, warmup=0.0)
        return [*searches, final]

    def _rewind_step(self, course: Campaign) -> int | None:
        """Return the step of the first round that a ticket goes back to."""
        if self.mode == "prune":
            return None
        limit = self.search_epochs or course.run.options.epochs
        return step_of(course, "rewind_epochs", self.rewind_epochs, limit)

    def _start(self, course: Campaign) -> None:
        make_dense(course, self)
        gates = {name: SoftMask(layer.parameter, self.initial_mask) for name, layer in course.layers.items()}
        self._open(course, _Search.over(gates))
        self._keep_rewind_point(course)

    def _open(self, course: Campaign, search: _Search) -> None:
        course.memory["search"] = search
        for name, layer in _users(course):
            layer.gate = search.gates.get(name)  # none for one that was frozen for a while
        self._set_temperature(course)

    def _set_temperature(self, course: Campaign) -> None:
        """Set the temperature of the coming step."""
        epochs = course.stages[0].epochs
        epoch = course.steps // course.steps_per_epoch
        last = epoch >= epochs - 1
        temperature = self.final_temperature if last else self.final_temperature ** (epoch / (epochs - 1))
        for gate in course.memory["search"].gates.values():
            gate.temperature = temperature

    def _keep_rewind_point(self, course: Campaign) -> None:
        if course.stages_done == 0 and course.steps == self._rewind_step(course):
            course.memory["rewind"] = keep_point(course)

    def _after_step(self, course: Campaign) -> bool:
        search: _Search | None = course.memory.get("search")
        if search is not None:
            _free_frozen(course, search)
            share = course.optimizer.param_groups[0]["lr"] / course.run.options.lr
            search.step(self.mask_lr * share, self.penalty, is_shared(course.net))
            self._set_temperature(course)
            self._keep_rewind_point(course)
        return False

    def _after_stage(self, course: Campaign, stage: Stage) -> None:
        search: _Search | None = course.memory.get("search")
        if search is None:
            course.trace.append(trace_entry(course, phase=stage.kind))
            return
        # a soft mask is hardly ever exactly zero: what counts is the sign of the score
        positive = sum(int((scores > 0).sum()) for scores in search.scores.values())
        course.trace.append(trace_entry(course, course.net.nnz - course.nnz + positive, phase=stage.kind))
        course.restart_optimizer()
        if course.stages[0].kind == "search":
            for gate in search.gates.values():
                gate.restart(self.final_temperature, self.initial_mask)
            self._open(course, _Search.over(search.gates))
        else:
            self._harden(course, self._masks(course, search))

    def _masks(self, course: Campaign, search: _Search) -> dict[str, Tensor]:
        """Return the hard masks that the scores stand for."""
        if self.density is None:
            return {name: scores > 0 for name, scores in search.scores.items()}
        keys = EdgeKeys(self.seed, f"continuous round {len(course.trace)}")
        return top(search.scores, course.edges_at(self.density), keys).masks

    def _harden(self, course: Campaign, masks: Mapping[str, Tensor]) -> None:
        """End the search: masks for gates."""
        if self.mode == "ticket":
            return_to(course, course.memory.pop("rewind"))
        else:
            scale = 1.0 / _sigmoid(self.initial_mask)
            with torch.no_grad():
                for name in masks:
                    course.net.layers[name].parameter.mul_(scale)
        self._close(course)
        change_masks(course.net, course.optimizer, masks)

    def _close(self, course: Campaign) -> None:
        course.memory.pop("search", None)
        for _, layer in _users(course):
            layer.__dict__.pop("gate", None)

    def _wants_gradient(self, course: Campaign) -> bool:
        return False

    # -- state ----------------------------------------------------------------------------------------------

    def _memory(self, course: Campaign) -> dict[str, Any]:
        search: _Search | None = course.memory.get("search")
        return {
            "scores": None if search is None else search.scores,
            "optimizer": None if search is None else search.optimizer.state_dict(),
            "rewind": course.memory.get("rewind"),
        }

    def _recall(self, course: Campaign, memory: Mapping[str, Any]) -> None:
        self._close(course)
        course.memory = {} if memory["rewind"] is None else {"rewind": memory["rewind"]}
        if memory["scores"] is None:
            return
        layers = {name: course.net.layers[name] for name in memory["scores"]}
        gates = {name: SoftMask(layer.parameter, self.initial_mask) for name, layer in layers.items()}
        search = _Search.over(gates)
        with torch.no_grad():
            for name, gate in gates.items():
                gate.scores.copy_(memory["scores"][name])
        search.optimizer.load_state_dict(memory["optimizer"])
        self._open(course, search)


def _free_frozen(course: Campaign, search: _Search) -> None:
    """Take the gates off layers that were frozen since: they keep the mask they have, all edges, and their weights."""
    layers = course.layers
    gone = [search.gates.pop(name) for name in list(search.gates) if name not in layers]
    for gate in gone:
        group = search.optimizer.param_groups[0]
        group["params"] = [scores for scores in group["params"] if scores is not gate.scores]
        search.optimizer.state.pop(gate.scores, None)
        for module in course.net.modules():
            if isinstance(module, MaskedLayer) and module.gate is gate:
                module.__dict__.pop("gate", None)


def _users(course: Campaign) -> Iterator[tuple[str, MaskedLayer]]:
    """Yield every layer that computes with a weight of `course.layers`, ties among them, with the name of that."""
    names = {id(layer.parameter): name for name, layer in course.layers.items()}
    for module in course.net.modules():
        if isinstance(module, MaskedLayer) and id(module.parameter) in names:
            yield names[id(module.parameter)], module


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))
