"""Methods whose masks depend on the number of the step (and on weights and gradients), not on accuracy.

One training, one clock. A subclass says which masks it starts from, after which steps it chooses new ones, and how;
counting, exploration, gradients, state and the single stage of training are here.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from growfx.distributed.sharded import reshard
from growfx.errors import CheckpointError
from growfx.masked.agreement import share_buffers
from growfx.masked.layers import MaskedLayer
from growfx.masked.mask_bits import pack, unpack
from growfx.masked.optimizers import StepWatch
from growfx.masked.shared import is_shared
from growfx.methods.attached import Attached
from growfx.methods.base import Method, check_accuracy, check_clock, check_net, check_state, not_attached, reading_state
from growfx.methods.masks import change_masks, collect_gradients, find_shards
from growfx.methods.scope import Scope, check_optimizer, find_scope
from growfx.methods.session import Attachment, Session, Stage
from growfx.methods.sign_in import SignIn, check_sign_in
from growfx.methods.starting import warn_if_replaced
from growfx.methods.unused import Use, warn_of_unused
from growfx.options import check_ranges

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["Course", "Stepwise"]


@dataclass
class Course(Attached):
    """One training under a stepwise method.

    Attributes:
        net, optimizer: what the method is attached to.
        scope: the layers whose masks may change, and what a density counts.
        total_steps: optimizer steps of the training; steps_per_epoch: of one epoch.
        steps: optimizer steps so far.
        updates: how many times masks were chosen anew.
        memory: what else the method has to remember, by name: tensors, numbers, lists, dicts.
        start: what has to be known of the masks it started from, by name, as plain values.
        ever_active: per layer, which edges were active at any time.
        session: the run of `growfx.train`, None in the user's own loop.
        stages: the stages of training still to come; empty in the user's own loop.
        sign_in: trains the weights as products, None where the method has no such option or it is off.
        tools: what a method found out about the network and can find out again, by name; not in its state.
    """

    net: MaskedGraph
    optimizer: Optimizer
    scope: Scope
    total_steps: int
    steps_per_epoch: int
    steps: int = 0
    updates: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    ever_active: dict[str, Tensor] = field(default_factory=dict)
    session: Session | None = None
    stages: list[Stage] = field(default_factory=list)
    sign_in: SignIn | None = None
    tools: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.watch = StepWatch(self.optimizer, [layer.trained for layer in self.net.layers.values()])

    @property
    def done(self) -> float:
        """Fraction of all steps made; may pass 1 when training goes on for longer than announced."""
        return self.steps / self.total_steps

    @property
    def layers(self) -> dict[str, MaskedLayer]:
        """The layers whose masks may change now; those frozen in the meantime are left out."""
        return self.scope.layers

    def edges_at(self, density: float) -> int:
        """How many edges `layers` have at `density`, see `Scope.edges_at`."""
        return self.scope.edges_at(density)

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
        """Masks of `layers`, not copied."""
        return {name: layer.mask for name, layer in self.layers.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights of `layers`, not copied."""
        return {name: layer.parameter.detach() for name, layer in self.layers.items()}

    @property
    def magnitudes(self) -> dict[str, Tensor]:
        """Magnitudes of the weights of `layers`."""
        return {name: weight.abs() for name, weight in self.weights.items()}


@dataclass(frozen=True)
class Stepwise(Method):
    """A method with one training and one clock."""

    stages: ClassVar[tuple[str, ...] | None] = ("final",)

    _attachment: Attachment[Course] = field(default_factory=Attachment[Course], init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_ranges(self)
        self._check()

    # -- for subclasses -------------------------------------------------------------------------------------

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

        Raises `ConfigError` as `Method.attach`, where the options do not fit the network: for example where layers
        that keep their masks and are counted alone are denser than `density`.
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
        net = check_net(self, net)
        total_steps, steps_per_epoch = check_clock(total_steps, steps_per_epoch)
        find_shards(self, net)
        scope = find_scope(self, net, self._least_density)
        check_optimizer(self, net, optimizer)
        epochs_between: int = getattr(self, "sign_in", 0)
        if epochs_between:
            check_sign_in(net, optimizer)
        course = Course(net, optimizer, scope, total_steps, steps_per_epoch, session=session)
        warn_of_unused(Use(self, total_steps, own_loop=session is None))
        if is_shared(net):
            share_buffers(net)  # norms may count in the starting masks
        with net.whole_weights():
            masks = self._start(course)
        warn_if_replaced(self, scope, masks)
        change_masks(net, optimizer, masks)
        course.ever_active = {name: net.layers[name].mask.clone() for name in scope.names}
        if epochs_between:
            course.sign_in = SignIn(net, optimizer, epochs_between * steps_per_epoch)
        self._attachment.state = course
        self._look_ahead(course)
        return course

    @property
    def _least_density(self) -> float | None:
        """The least density the method aims at; None for one without."""
        return getattr(self, "density", None)

    def step(self) -> bool:
        """Count a step and, where one is due, choose masks anew. One that a loss scaler left out is not counted."""
        course = self._attached()
        if not course.watch.stepped():
            self._look_ahead(course)
            return False
        if course.net.sharded:
            reshard(course.net)
        course.steps += 1
        masks = self._update(course) if course.layers else None  # all may have been frozen
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
        return self._attachment.state is not None and self._wants_gradient(
            self._attachment.state, self._attachment.state.steps + 1
        )

    @property
    def exploration(self) -> float:
        """Fraction of all edges that were active at any time (Rs of Liu et al., In-Time Over-Parameterization, ICML
        2021), over the layers that the method may change.
        """
        ever = self._attached().ever_active.values()
        return sum(int(seen.sum()) for seen in ever) / sum(seen.numel() for seen in ever)

    @property
    def trace(self) -> list[dict[str, Any]]:
        """One entry a report: round, density, nnz, val_accuracy, fit (None), exploration."""
        return [] if self._attachment.state is None else self._attachment.state.trace

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
            "scope": course.scope.state_dict(),
            "start": copy.deepcopy(course.start),
            "ever_active": {name: pack(mask) for name, mask in course.ever_active.items()},
            "stages_left": len(course.stages),
            "sign_in": None if course.sign_in is None else course.sign_in.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, on the network and optimizer attached to.

        Raises `CheckpointError` for the state of another method or network.
        """
        course = self._attached()
        check_state(state, self.name)
        with reading_state(self.name):
            scope = course.scope.restored(state.get("scope"))  # states of version 0.1 have none
            if set(state["ever_active"]) != set(scope.names):
                raise CheckpointError("the state is of a network with other layers; resume with the model it came from")
            layers = course.net.layers
            ever_active = {name: unpack(bits, layers[name].mask) for name, bits in state["ever_active"].items()}
            device = next((layer.mask.device for layer in layers.values()), torch.device("cpu"))
            memory = _moved(copy.deepcopy(state["memory"]), device)
            start = _moved(copy.deepcopy(state.get("start", {})), device)
            steps, updates, left = (int(state[key]) for key in ("steps", "updates", "stages_left"))
            trace = list(copy.deepcopy(state["trace"]))
            if course.sign_in is not None:
                course.sign_in.load_state_dict(state["sign_in"])
        course.scope, course.ever_active, course.memory, course.start = scope, ever_active, memory, start
        course.steps, course.updates, course.trace = steps, updates, trace
        del course.stages[: len(course.stages) - left]
        self._look_ahead(course)

    def _attached(self) -> Course:
        if self._attachment.state is None:
            raise not_attached(self.name)
        return self._attachment.state


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return [_moved(item, device) for item in value] if isinstance(value, list) else value
