"""The state of a run: what changes during training, what a checkpoint stores, and how it is restored.

It is written at the end of an epoch, or in the middle of one: then with the partial epoch (`EpochPart`), the
state of every random generator among it. Everything else random follows from the run's seed and the epoch's number.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from growfx.analysis.cost import CostMeter
from growfx.distributed import ranks
from growfx.errors import CheckpointError, GrowfxError
from growfx.masked.graph import MaskedGraph
from growfx.masked.modules import chain_tensors
from growfx.methods.base import Method
from growfx.methods.session import Stage
from growfx.runtime.train import choices_of, take_choices
from growfx.training.clock import Clock
from growfx.training.evaluation import Score
from growfx.training.randomness import randomness_of, set_randomness
from growfx.training.step import TrainStep

__all__ = ["EpochPart", "Position", "RunState"]


@dataclass
class Position:
    """Where a run is, at the beginning of an epoch. `epoch` and `steps` count from the beginning of the run; `stage`
    counts the stages done, and `stage_step` the steps into the next."""

    stage: int = 0
    stage_step: int = 0
    epoch: int = 0
    steps: int = 0


@dataclass
class EpochPart:
    """The part of the current epoch that is done.

    Attributes:
        loss: sum over its steps, on the run's device.
        done: its steps so far.
        uncounted: how many of them the cost meter does not know of yet.
        random: state of the generators after the last of them (see `mark`); None while nobody needs it.
        seconds: wall time of the epoch up to then, over all the processes that it was continued in.
    """

    loss: Tensor
    done: int = 0
    uncounted: int = 0
    random: dict[str, Any] | None = None
    seconds: float = 0.0

    def mark(self, loader: Any, seconds: float) -> None:
        """Keep the state of all generators, a loader's own among them, and the epoch's wall time so far."""
        self.seconds = seconds
        own = getattr(loader, "generator", None)
        self.random = {
            **randomness_of(self.loss.device),
            "loader": own.get_state() if isinstance(own, torch.Generator) else None,
        }

    def mean_loss(self) -> float:
        """Return the loss of a step, on average over the steps and ranks."""
        total = self.loss.clone()
        ranks.average([total])
        return float(total) / self.done

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, on the CPU."""
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "loss": self.loss.cpu()}

    def resume_random(self, loader: Any = None) -> None:
        """Put back what `mark` kept; the state of a loader's own generator only where a `loader` is given."""
        assert self.random is not None
        set_randomness(self.random, self.loss.device)
        own = getattr(loader, "generator", None)
        if isinstance(own, torch.Generator) and self.random["loader"] is not None:
            own.set_state(self.random["loader"])


class RunState:
    """What changes during a run, and all of it that a checkpoint holds.

    Attributes:
        net, optimizer, method, step, meter: keep their own state.
        at: position at the beginning of the epoch under way.
        part: the part of this epoch that is done; None between epochs.
        ema: average of the network over an averaged stage, over the `averaged_epochs` of one; None elsewhere.
        val_accuracy: of the last validation, NaN before the first.
        best, best_nnz: validation accuracy and number of edges of the best epoch so far.
        last_score: what the last growth round was measured by.
        clock: seconds of training and evaluation so far.
    """

    def __init__(
        self,
        net: MaskedGraph,
        optimizer: Optimizer,
        method: Method,
        step: TrainStep,
        meter: CostMeter,
        average: Callable[[Stage], Any],
    ) -> None:
        self.net, self.optimizer, self.method, self.step, self.meter = net, optimizer, method, step, meter
        self._average = average
        self.at = Position()
        self.part: EpochPart | None = None
        self.ema: Any = None
        self.averaged_epochs = 0
        self.val_accuracy = math.nan
        self.best, self.best_nnz = -1.0, net.numel + 1
        self.last_score: Score | None = None
        self.clock = Clock()

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(chain_tensors(self.net)).device

    @property
    def steps(self) -> int:
        """Optimizer steps since the beginning of the run, those of the epoch under way among them."""
        return self.at.steps + (self.part.done if self.part else 0)

    def begin_stage(self, stage: Stage) -> None:
        """Begin the average of an averaged stage, or go on with it; forget it elsewhere."""
        if not stage.averaged:
            self.ema = None
        elif self.ema is None or self.averaged_epochs != stage.epochs:
            self.averaged_epochs = stage.epochs  # its memory is a part of the stage
            self.ema = self._average(stage)

    def open_epoch(self) -> EpochPart:
        """Return the part of the current epoch that is done, an empty one at its beginning."""
        if self.part is None:
            self.part = EpochPart(torch.zeros((), device=self.device))
        return self.part

    def close_epoch(self, steps: int) -> None:
        """Count an epoch of `steps`."""
        self.part = None
        self.at.epoch += 1
        self.at.steps += steps

    def is_best(self) -> bool:
        """Whether no epoch with as few edges was as accurate: a method may still be on its way to its density."""
        better = (-self.net.nnz, self.val_accuracy) > (-self.best_nnz, self.best)
        if better:
            self.best, self.best_nnz = self.val_accuracy, self.net.nnz
        return better

    def state_dict(self, parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
        """Return everything that a run goes on from.

        `parts`: the part of the current epoch that is done on every rank, this one first; None between epochs.
        """
        return {
            "position": dataclasses.asdict(self.at),
            "part": parts[0],
            "other_parts": parts[1:],
            **{name: state(self) for name, state in _STATES.items()},
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "best": self.best,
            "best_nnz": self.best_nnz,
            "val_accuracy": self.val_accuracy,
            "last_score": None if self.last_score is None else self.last_score.correct,
            "seconds": self.clock.seconds(),
            "kernels": choices_of(self.net),
        }

    def load_state_dict(self, state: Mapping[str, Any], where: str) -> None:
        """Go on from `state_dict()`; everything is as it was where that fails.

        Raises:
            CheckpointError: the state is not one of this run; says `where` it is from, which part of it, and what
                differs.
        """
        _require_fit(self.net.state_dict(), state.get("net"), where)
        self._require_parts(state, where)
        loaders = self._part_loaders(state)
        before = {part: copy.deepcopy(_STATES[part](self)) for part in loaders if part in _STATES}
        done: list[str] = []
        try:
            for part, load in loaders.items():
                done.append(part)
                load()
        except _MISFITS as error:
            self.at, self.part, self.ema = Position(), None, None
            for part in reversed([part for part in done if part in before]):
                with suppress(*_MISFITS):  # what it had before is what it takes
                    self._part_loaders({**state, **before})[part]()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (
                f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split()) or repr(error)
            )
            raise CheckpointError(f"{where} does not fit this run: `{done[-1]}` cannot be loaded ({reason})") from error

    def _part_loaders(self, state: Mapping[str, Any]) -> dict[str, Callable[[], object]]:
        """How each part of a state is taken up, in order: nothing is read before the part's turn."""
        loaders: dict[str, Callable[[], object]] = {
            "position": lambda: setattr(self, "at", Position(**state["position"])),
            "net": lambda: self.net.load_state_dict(state["net"]),
            "optimizer": lambda: self.optimizer.load_state_dict(state["optimizer"]),
            "method": lambda: self.method.load_state_dict(state["method"]),
            "step": lambda: self.step.load_state_dict(state["step"]),
            "ema": lambda: self._load_average(state["ema"]),
            "cost": lambda: self._load_cost(state["cost"]),
            "scores": lambda: self._load_scores(state),
            "part": lambda: self._load_part(state),
            "seconds": lambda: self.clock.load(state["seconds"]),
            "kernels": lambda: take_choices(self.net, state["kernels"]),
        }
        # Checkpoints of older versions lack some.
        return {name: load for name, load in loaders.items() if name not in _LATER or name in state}

    def _load_average(self, state: Mapping[str, Any] | None) -> None:
        stage = self.method.next_stage()
        if state is not None and stage is not None and stage.averaged:
            self.begin_stage(stage)
            self.ema.module.load_state_dict(state)

    def _load_cost(self, state: Mapping[str, Any]) -> None:
        self.meter.load_state_dict(state)
        self.meter.read_masks()

    def _load_scores(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_nnz = state["best"], state["best_nnz"]
        self.val_accuracy = state["val_accuracy"]
        self.last_score = None if state["last_score"] is None else Score(state["last_score"])

    def _load_part(self, state: Mapping[str, Any]) -> None:
        if state.get("part") is not None:
            own = [state["part"], *state.get("other_parts", [])][ranks.rank()]
            self.part = EpochPart(**{**own, "loss": own["loss"].to(self.device)})

    def _require_parts(self, state: Mapping[str, Any], where: str) -> None:
        """Raise `CheckpointError` unless a state has all its parts, those of the position and of the optimizer too."""
        names = ("position", "optimizer", "method", "ema", "cost", "best", "best_nnz", "val_accuracy", "last_score")
        missing = next((name for name in names if name not in state), None)
        if missing is not None:
            raise CheckpointError(f"{where} does not fit this run: it has no `{missing}`")
        for name in ("position", "optimizer", "method"):
            if not isinstance(state[name], Mapping):
                kind = type(state[name]).__name__
                raise CheckpointError(f"{where} does not fit this run: `{name}` is a {kind}, expected a dict")
        fields = {f.name for f in dataclasses.fields(Position)}
        if state["position"].keys() != fields:
            raise CheckpointError(
                f"{where} does not fit this run: `position` has {sorted(state['position'])}, expected {sorted(fields)}"
            )
        sizes = [len(group["params"]) for group in self.optimizer.state_dict()["param_groups"]]
        groups = state["optimizer"].get("param_groups")
        found = [len(group.get("params", ())) for group in groups] if isinstance(groups, list) else None
        if found != sizes:
            raise CheckpointError(
                f"{where} does not fit this run: `optimizer` has parameter groups of {found} parameters, "
                f"expected {sizes}"
            )


# What checkpoints of older versions do not have.
_LATER = ("step", "seconds", "kernels")
# What loading the state of another run raises.
_MISFITS = (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError, GrowfxError)
_STATES: dict[str, Callable[[RunState], Any]] = {
    "net": lambda run: run.net.state_dict(),
    "optimizer": lambda run: run.optimizer.state_dict(),
    "method": lambda run: run.method.state_dict(),
    "step": lambda run: run.step.state_dict(),
    "cost": lambda run: run.meter.state_dict(),
}


def _require_fit(own: Mapping[str, Any], found: Any, where: str) -> None:
    """Raise `CheckpointError` unless the state dict `found` has the names and shapes of `own`, masks among them."""
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where} holds no network (`net`); it is not one of a run")
    if not any(name.endswith(".mask") for name in found) and any(name.endswith(".mask") for name in own):
        raise CheckpointError(
            f"{where} holds a network without masks, a plain model's; load its weights with `net.load_state_dict` "
            "and start a new run in another folder"
        )
    for name in [*(n for n in own if n not in found), *(n for n in found if n not in own)]:
        has, lacks = ("this network", "the checkpoint") if name in own else ("the checkpoint", "this network")
        raise CheckpointError(f"{where} is of another model: {has} has `{name}`, {lacks} does not")
    for name, value in own.items():
        if isinstance(value, Tensor) and value.shape != found[name].shape:
            raise CheckpointError(
                f"{where} is of another model: `{name}` is {tuple(found[name].shape)} there and "
                f"{tuple(value.shape)} in this network"
            )
