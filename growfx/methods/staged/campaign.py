"""Methods that train several times over: a plan of stages, carried out by `growfx.train`.

A subclass says which stages follow each other, and what happens at the start, after a step and between stages; clock,
trace, state and the errors of wrong use are here.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.optim import Optimizer

from growfx.errors import CheckpointError, ConfigError
from growfx.methods.base import Method, check_accuracy, check_clock, check_state, reading_state
from growfx.methods.growth.snapshots import Snapshot
from growfx.methods.masks import change_masks
from growfx.methods.scope import check_optimizer, find_scope
from growfx.methods.session import Attachment, Session, Stage
from growfx.methods.starting import all_edges, warn_if_replaced
from growfx.methods.stepwise.course import Course
from growfx.methods.unused import Use, warn_of_unused
from growfx.options import check_ranges

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["Campaign", "Staged", "keep_point", "make_dense", "refuse_unused", "return_to", "step_of", "trace_entry"]


@dataclass
class Campaign(Course):
    """The stages of one run under a method.

    As a `Course`, but `steps` counts on the schedule of the stage under way (it starts at the stage's `first_step`),
    and `stages` holds the one under way and those to come.

    Attributes:
        plan: all stages of the run.
        accuracy: last one reported in the stage under way.
        fresh: state of the optimizer before its first step.
    """

    plan: list[Stage] = field(default_factory=list)
    accuracy: float | None = None
    fresh: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Session:
        """The run of `growfx.train`."""
        assert self.session is not None
        return self.session

    @property
    def stages_done(self) -> int:
        """How many stages are over."""
        return len(self.plan) - len(self.stages)

    def restart_optimizer(self) -> None:
        """Make the optimizer what it was before its first step, numbers it keeps beside the parameters' among them."""
        self.optimizer.load_state_dict(copy.deepcopy(self.fresh))


@dataclass(frozen=True)
class Staged(Method):
    """A method that plans the whole run, and therefore needs `growfx.train`."""

    _attachment: Attachment[Campaign] = field(
        default_factory=Attachment[Campaign], init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        self._check()

    # -- what a subclass says -------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise `ConfigError` for options that are in range each, but not together."""

    @abstractmethod
    def _plan(self, course: Campaign) -> list[Stage]:
        """Return all stages; raise `ConfigError` where the options do not fit the run. Nothing is changed here."""

    @abstractmethod
    def _start(self, course: Campaign) -> None:
        """Make the network what the first stage starts from."""

    @abstractmethod
    def _after_step(self, course: Campaign) -> bool:
        """Do what follows a step, already counted; returns whether masks changed."""

    @abstractmethod
    def _after_stage(self, course: Campaign, stage: Stage) -> None:
        """Do what follows `stage`; it is no longer among `course.stages`."""

    @abstractmethod
    def _wants_gradient(self, course: Campaign) -> bool:
        """Whether the step under way computes the gradient of absent edges."""

    @abstractmethod
    def _memory(self, course: Campaign) -> dict[str, Any]:
        """Return what else has to be remembered, as plain values."""

    @abstractmethod
    def _recall(self, course: Campaign, memory: Mapping[str, Any]) -> None:
        """Continue from what `_memory` returned; clock and stages are already those of that time."""

    @property
    def _why_staged(self) -> str:
        """Completes "method `name` ..." for those who attach it."""
        return "trains several times over"

    # -- the same for all -----------------------------------------------------------------------------------

    def attach(self, net: MaskedGraph, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int) -> NoReturn:
        """Raise `ConfigError`: the user's own loop has a single training."""
        raise ConfigError(f"method `{self.name}` {self._why_staged}; run it through growfx.train")

    def begin(self, session: Session) -> None:
        """Plan the stages of the run and start the first.

        Raises `ConfigError` where the options do not fit the network or the length of the run.
        """
        epochs, steps = session.options.epochs, session.steps_per_epoch
        check_clock(epochs * steps, steps)
        scope = find_scope(self, session.net, self._least_density, off_path=self._chooser.off_path)
        check_optimizer(self, session.net, session.optimizer)
        course = Campaign(session.net, session.optimizer, scope, epochs * steps, steps, session=session)
        course.plan = self._plan(course)
        course.stages = list(course.plan)
        course.steps = course.plan[0].first_step
        course.fresh = copy.deepcopy(session.optimizer.state_dict())
        warn_of_unused(Use(self))
        self._start(course)
        self._attachment.state = course

    @property
    def _chooser(self) -> Method:
        """The method by whose rule masks are chosen."""
        return self

    @property
    def _least_density(self) -> float | None:
        """The least density the method aims at; None for an outcome."""
        return getattr(self, "density", None)

    def step(self) -> bool:
        """Count a step on the schedule of the stage under way."""
        course = self._begun()
        course.steps += 1
        return self._after_step(course)

    def report(self, accuracy: float, noise: float | None = None) -> None:
        """Take note of the accuracy; the last one of a stage goes into the trace."""
        course = self._begun()
        check_accuracy(accuracy, noise)
        course.accuracy = float(accuracy)

    def next_stage(self) -> Stage | None:
        """Return the stage under way; None when all are over."""
        stages = self._begun().stages
        return stages[0] if stages else None

    def end_stage(self, stage: Stage) -> None:
        """Write the trace and prepare the network for the next stage."""
        course = self._begun()
        del course.stages[0]
        course.steps = course.stages[0].first_step if course.stages else 0
        self._after_stage(course, stage)
        course.accuracy = None

    @property
    def needs_dense_gradient(self) -> bool:
        """Whether the step under way computes the gradient of absent edges."""
        return self._attachment.state is not None and self._wants_gradient(self._attachment.state)

    @property
    def trace(self) -> list[dict[str, Any]]:
        """One entry a stage that is over, in order; see the class."""
        return [] if self._attachment.state is None else self._attachment.state.trace

    @property
    def growing(self) -> bool:
        """False: there are no growth rounds."""
        return False

    @property
    def stop_reason(self) -> str:
        """Empty: there are no growth rounds."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return stage, clock, trace and memory. Masks and weights of the moment are in the network's state dict."""
        course = self._begun()
        return {
            "method": self.name,
            "layers": {name: list(course.net.layers[name].mask.shape) for name in course.scope.names},
            "scope": course.scope.state_dict(),
            "start": copy.deepcopy(course.start),
            "stages_left": len(course.stages),
            "steps": course.steps,
            "accuracy": course.accuracy,
            "trace": copy.deepcopy(course.trace),
            "memory": copy.deepcopy(self._memory(course)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; call `begin` first.

        Raises `CheckpointError` for the state of another method, network or plan.
        """
        course = self._begun()
        check_state(state, self.name)
        before = dict(vars(course))
        try:
            with reading_state(self.name):
                self._read_state(course, state)
        except BaseException:
            vars(course).update(before)
            raise

    def _read_state(self, course: Campaign, state: Mapping[str, Any]) -> None:
        course.scope = course.scope.restored(state.get("scope"))  # states of version 0.1 have none
        course.start = copy.deepcopy(state.get("start", course.start))
        if state["layers"] != {name: list(course.net.layers[name].mask.shape) for name in course.scope.names}:
            raise CheckpointError("the state is of a network with other layers; resume with the model it came from")
        course.plan = self._plan(course)
        left = int(state["stages_left"])
        if not 0 <= left <= len(course.plan):
            raise CheckpointError(f"the state has {left} stages to come, this run {len(course.plan)} in all")
        course.stages = course.plan[len(course.plan) - left :]
        course.steps, course.accuracy = int(state["steps"]), state["accuracy"]
        course.trace = list(copy.deepcopy(state["trace"]))
        self._recall(course, copy.deepcopy(state["memory"]))

    def _begun(self) -> Campaign:
        if self._attachment.state is None:
            raise ConfigError(f"method `{self.name}` is not attached; run it through growfx.train")
        return self._attachment.state


# -- what stages have in common -------------------------------------------------------------------------------


def trace_entry(course: Campaign, nnz: int | None = None, **more: Any) -> dict[str, Any]:
    """Return the trace's entry of a stage just trained, with the network's edges unless `nnz` says otherwise."""
    edges = course.net.nnz if nnz is None else nnz
    entry = {"round": len(course.trace), "density": edges / course.net.numel, "nnz": edges}
    return {**entry, "val_accuracy": course.accuracy, "fit": None, **more}


def make_dense(course: Campaign, method: Staged) -> None:
    """Give the layers that may change all their edges; those that were absent start at zero."""
    masks = all_edges(course.layers)
    warn_if_replaced(method, course.scope, masks)
    change_masks(course.net, course.optimizer, masks)


def step_of(course: Campaign, name: str, epochs: float, limit: int) -> int:
    """Return the step that an option `name` of so many epochs means.

    Raises `ConfigError` unless it lies before the end of a training of `limit` epochs.
    """
    step = round(epochs * course.steps_per_epoch)
    if step >= limit * course.steps_per_epoch:
        raise ConfigError(
            f"`{name}` = {epochs:g} is not before the end of a training of {limit} epochs; allowed: [0, {limit})"
        )
    return step


def keep_point(course: Campaign) -> dict[str, dict[str, torch.Tensor]]:
    """Copy weights, masks, norm statistics and every other buffer, to come back to them with `return_to`."""
    with course.net.whole_weights():
        return Snapshot.take(course.net).state_dict()


def return_to(course: Campaign, point: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Put back what `keep_point` copied."""
    with course.net.whole_weights():
        Snapshot.from_state(point, course.net).restore(course.net, course.optimizer)


def refuse_unused(method: Staged, name: str, reason: str) -> None:
    """Raise `ConfigError` when the option `name`, which has no effect for `reason`, is not at its default."""
    default = next(f.default for f in dataclasses.fields(method) if f.name == name)
    value = getattr(method, name)
    if value != default:
        raise ConfigError(f"`{name}` = {value!r} has no effect with {reason}; leave it at {default!r}")
