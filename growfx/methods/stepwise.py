"""Methods whose masks depend on the number of the step (and on weights and gradients), not on accuracy.

One training, one clock. A subclass says which masks it starts from, after which steps it chooses new ones, and how;
counting, exploration, gradients, state and the single stage of training are here.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from growfx import ranks
from growfx.errors import CheckpointError, ConfigError, TraceError
from growfx.layers import MaskedLayer
from growfx.mask_bits import pack, unpack
from growfx.methods.base import (
    Method,
    change_masks,
    check_accuracy,
    check_clock,
    check_state,
    collect_gradients,
    find_shards,
    not_attached,
)
from growfx.optimizer_hooks import StepWatch
from growfx.options import check_ranges
from growfx.passes.path_products import path_gradients
from growfx.session import Session, Stage
from growfx.shards import reshard, unsharded

if TYPE_CHECKING:
    from growfx.graph import MaskedGraph

__all__ = ["Course", "Stepwise"]


@dataclass
class Course:
    """One training under a stepwise method.

    Attributes:
        net, optimizer: what the method is attached to.
        layers: the masked layers that some path crosses; the masks of all others are left alone.
        total_steps: optimizer steps of the training; steps_per_epoch: of one epoch.
        steps: optimizer steps so far.
        updates: how many times masks were chosen anew.
        memory: what else the method has to remember, by name: tensors, numbers, lists, dicts.
        ever_active: per layer, which edges were active at any time.
        session: the run of `growfx.train`, None in a loop of one's own.
        stages: the stages of training still to come; empty in a loop of one's own.
    """

    net: MaskedGraph
    optimizer: Optimizer
    layers: dict[str, MaskedLayer]
    total_steps: int
    steps_per_epoch: int
    steps: int = 0
    updates: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    ever_active: dict[str, Tensor] = field(default_factory=dict)
    session: Session | None = None
    stages: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watch = StepWatch(self.optimizer, [layer.parameter for layer in self.net.layers.values()])

    @property
    def done(self) -> float:
        """Fraction of all steps made; may pass 1 when training goes on for longer than announced."""
        return self.steps / self.total_steps

    def edges_at(self, density: float) -> int:
        """How many edges `layers` have when all masked layers of the network together have `density`.

        Raises `ConfigError` where the layers left alone have more than that, or nothing is left.
        """
        alone = sum(layer.nnz for name, layer in self.net.layers.items() if name not in self.layers)
        total = self.net.numel
        edges = round(density * total) - alone
        if edges < 1:
            raise ConfigError(
                f"a density of {density:.4g} is {round(density * total)} of {total} edges; {alone} of them are in "
                "layers no path crosses, which stay as they are, so allowed are densities above "
                f"{alone / total:.4g} that leave at least one edge"
            )
        return min(edges, self.numel)

    @property
    def numel(self) -> int:
        """Edges of `layers`, active or not."""
        return sum(layer.numel for layer in self.layers.values())

    @property
    def nnz(self) -> int:
        """Active edges of `layers`."""
        return sum(layer.nnz for layer in self.layers.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shapes of `layers`."""
        return {name: tuple(layer.mask.shape) for name, layer in self.layers.items()}

    @property
    def masks(self) -> dict[str, Tensor]:
        """Masks of `layers`, as they are (not copies)."""
        return {name: layer.mask for name, layer in self.layers.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights of `layers`, as they are (not copies)."""
        return {name: layer.parameter.detach() for name, layer in self.layers.items()}

    @property
    def magnitudes(self) -> dict[str, Tensor]:
        """Magnitudes of the weights of `layers`."""
        return {name: weight.abs() for name, weight in self.weights.items()}


@dataclass(frozen=True)
class Stepwise(Method):
    """A method with one training and one clock."""

    _course: Course | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_ranges(self)
        self._check()

    # -- what a subclass says -------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise `ConfigError` for options that are in range each, but not together."""

    @abstractmethod
    def _start(self, course: Course) -> Mapping[str, Tensor]:
        """Return the starting masks of `course.layers`; weights may be changed here too."""

    @abstractmethod
    def _update(self, course: Course) -> Mapping[str, Tensor] | None:
        """Return the masks after step number `course.steps` (counted from 1), or None to leave them."""

    @abstractmethod
    def _wants_gradient(self, course: Course, step: int) -> bool:
        """Whether `_update` after step number `step` reads dense gradients."""

    # -- the same for all -----------------------------------------------------------------------------------

    def attach(self, net: MaskedGraph, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int) -> None:
        """Choose the starting masks and set the clock.

        Raises `ConfigError` where the options do not fit the network: for example where layers that no path
        crosses, which stay as they are and are counted, alone are denser than `density`.
        """
        self._open(net, optimizer, total_steps, steps_per_epoch, None)

    def begin(self, session: Session) -> None:
        """Attach to the run's network for one training of all its epochs."""
        epochs, steps = session.options.epochs, session.steps_per_epoch
        course = self._open(session.net, session.optimizer, epochs * steps, steps, session)
        course.stages = [Stage("final", epochs)]

    def _open(
        self, net: MaskedGraph, optimizer: Optimizer, total_steps: int, steps_per_epoch: int, session: Session | None
    ) -> Course:
        check_clock(total_steps, steps_per_epoch)
        find_shards(self, net)
        with unsharded(net):
            layers = layers_on_paths(net) if self.changes_masks else dict(net.layers)
        course = Course(net, optimizer, layers, total_steps, steps_per_epoch, session=session)
        if ranks.is_shared(net):
            ranks.share_buffers(net)  # norms may count in the starting masks
        change_masks(net, optimizer, self._start(course))
        course.ever_active = {name: layer.mask.clone() for name, layer in layers.items()}
        object.__setattr__(self, "_course", course)
        self._look_ahead(course)
        return course

    def step(self) -> bool:
        """Count a step and, where one is due, choose masks anew. One that a loss scaler left out is not counted."""
        course = self._attached()
        if not course.watch.stepped():
            self._look_ahead(course)
            return False
        if course.net.sharded:
            reshard(course.net)
        course.steps += 1
        masks = self._update(course)
        changed = 0
        if masks is not None:
            course.updates += 1
            changed = change_masks(course.net, course.optimizer, masks)
            for name in masks:
                course.ever_active[name] |= course.layers[name].mask
        self._look_ahead(course)
        return changed > 0

    def _look_ahead(self, course: Course) -> None:
        """Collect dense gradients in the next step, if its update needs them."""
        wanted = self._wants_gradient(course, course.steps + 1)
        collect_gradients(course.layers.values(), wanted)

    def report(self, accuracy: float, noise: float | None = None) -> None:
        """Write the accuracy to the trace, with density and exploration of the moment."""
        course = self._attached()
        check_accuracy(accuracy, noise)
        if not self.changes_masks:
            return
        entry = {
            "round": len(course.trace),
            "density": course.net.density,
            "nnz": course.net.nnz,
            "val_accuracy": float(accuracy),
            "fit": None,
            "exploration": self.exploration,
        }
        course.trace.append(entry)

    def next_stage(self) -> Stage | None:
        """Return the training, until it is over."""
        stages = self._attached().stages
        return stages[0] if stages else None

    def end_stage(self, stage: Stage) -> None:
        """Training is over."""
        del self._attached().stages[0]

    @property
    def needs_dense_gradient(self) -> bool:
        """True in steps whose update reads the gradient of absent edges."""
        return self._course is not None and self._wants_gradient(self._course, self._course.steps + 1)

    @property
    def exploration(self) -> float:
        """Fraction of all edges that were active at any time (Rs of Liu et al., In-Time Over-Parameterization, ICML
        2021), over the layers that some path crosses.
        """
        ever = self._attached().ever_active.values()
        return sum(int(seen.sum()) for seen in ever) / sum(seen.numel() for seen in ever)

    @property
    def trace(self) -> list[dict[str, Any]]:
        """One entry a report: round, density, nnz, val_accuracy, fit (None), exploration."""
        return [] if self._course is None else self._course.trace

    @property
    def growing(self) -> bool:
        """False: there are no rounds."""
        return False

    @property
    def stop_reason(self) -> str:
        """Empty: there are no rounds."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return clock, trace, memory and history. The masks of the moment are in the network's state dict."""
        course = self._attached()
        return {
            "method": self.name,
            "steps": course.steps,
            "updates": course.updates,
            "trace": copy.deepcopy(course.trace),
            "memory": copy.deepcopy(course.memory),
            "ever_active": {name: pack(mask) for name, mask in course.ever_active.items()},
            "stages_left": len(course.stages),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, on the network and optimizer attached to.

        Raises `CheckpointError` for the state of another method or network.
        """
        course = self._attached()
        check_state(state, self.name)
        if set(state["ever_active"]) != set(course.layers):
            raise CheckpointError("the state is of a network with other layers; resume with the model it came from")
        course.steps, course.updates = int(state["steps"]), int(state["updates"])
        course.trace = copy.deepcopy(state["trace"])
        device = next(iter(course.layers.values())).mask.device if course.layers else torch.device("cpu")
        course.memory = _moved(copy.deepcopy(state["memory"]), device)
        for name, bits in state["ever_active"].items():
            course.ever_active[name] = unpack(bits, course.layers[name].mask)
        del course.stages[: len(course.stages) - int(state["stages_left"])]
        self._look_ahead(course)

    def _attached(self) -> Course:
        if self._course is None:
            raise not_attached(self.name)
        return self._course


def layers_on_paths(net: MaskedGraph) -> dict[str, MaskedLayer]:
    """Return the layers that some path from input to output crosses; all, where the paths of a network are unknown."""
    ones = {name: torch.ones_like(layer.mask, dtype=torch.float64) for name, layer in net.layers.items()}
    try:
        off_path = path_gradients(net, ones, norm="identity", unit_scales=True).off_path
    except TraceError:
        off_path = {}
    return {name: layer for name, layer in net.layers.items() if name not in off_path}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return [_moved(item, device) for item in value] if isinstance(value, list) else value
