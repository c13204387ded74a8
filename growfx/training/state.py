"""What a checkpoint of a run holds, and how a run takes it up again.

It is written at the end of an epoch, or in the middle of one: then with what the epoch has come to (`EpochPart`), the
state of every random generator among it. Everything else random follows from the run's seed and the epoch's number.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from growfx.distributed import ranks
from growfx.errors import CheckpointError, GrowfxError
from growfx.training.evaluation import Score
from growfx.training.randomness import randomness_of, set_randomness

if TYPE_CHECKING:
    from growfx.training.run import Run

__all__ = ["EpochPart", "Position", "restore", "state_of"]


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
    """What an epoch under way has come to.

    Attributes:
        loss: sum over its steps, on the run's device.
        done: its steps so far.
        uncounted: how many of them the cost meter does not know of yet.
        random: state of the generators after the last of them (see `mark`); None while nobody needs it.
    """

    loss: Tensor
    done: int = 0
    uncounted: int = 0
    random: dict[str, Any] | None = None

    def mark(self, loader: Any) -> None:
        """Keep the state of all generators, a loader's own among them."""
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


def state_of(run: "Run", parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Everything that a run goes on from, as `Checkpoints.save` takes it.

    `parts`: what the epoch under way has come to on every rank, this one first; None between epochs.
    """
    assert run.folder is not None
    return {
        "config": run.folder.config,
        "position": dataclasses.asdict(run.at),
        "part": parts[0],
        "other_parts": parts[1:],
        "net": run.net.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "method": run.method.state_dict(),
        "step": run.step.state_dict(),
        "ema": run.ema.module.state_dict() if run.ema is not None else None,
        "cost": run.meter.state_dict(),
        "best": run.best,
        "best_nnz": run.best_nnz,
        "val_accuracy": run.val_accuracy,
        "last_score": None if run.last_score is None else run.last_score.correct,
        "log_position": run.folder.log_position(),
    }


def restore(run: "Run", state: Mapping[str, Any], where: str) -> None:
    """Let `run`, set up and not begun, go on from `state_of`; it is as it was where that fails.

    Raises:
        CheckpointError: the state is not one of this run; says `where` it is from, which part of it, and what differs.
    """
    _require_fit(run.net.state_dict(), state.get("net"), where)
    _require_parts(run, state, where)
    loaders = _part_loaders(run, state)
    before = {part: copy.deepcopy(_STATES[part](run)) for part in loaders if part in _STATES}
    done: list[str] = []
    try:
        for part, load in loaders.items():
            done.append(part)
            load()
    except _MISFITS as error:
        run.at, run.part, run.ema = Position(), None, None
        for part in reversed([part for part in done if part in before]):
            with suppress(*_MISFITS):  # what it had before is what it takes
                _part_loaders(run, {**state, **before})[part]()
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split()) or repr(error)
        raise CheckpointError(f"{where} does not fit this run: `{done[-1]}` cannot be loaded ({reason})") from error


# What loading the state of another run raises.
_MISFITS = (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError, GrowfxError)
_STATES: dict[str, Callable[["Run"], Any]] = {
    "net": lambda run: run.net.state_dict(),
    "optimizer": lambda run: run.optimizer.state_dict(),
    "method": lambda run: run.method.state_dict(),
    "step": lambda run: run.step.state_dict(),
    "cost": lambda run: run.meter.state_dict(),
}


def _part_loaders(run: "Run", state: Mapping[str, Any]) -> dict[str, Callable[[], object]]:
    """How each part of a state is taken up, in order: nothing is read before the part's turn."""

    def position() -> None:
        run.at = Position(**state["position"])

    def ema() -> None:
        stage = run.method.next_stage()
        if state["ema"] is not None and stage is not None and stage.averaged:
            run.ema = run.average(stage)
            run.ema.module.load_state_dict(state["ema"])

    def cost() -> None:
        run.meter.load_state_dict(state["cost"])
        run.meter.read_masks()

    def scores() -> None:
        run.best, run.best_nnz = state["best"], state["best_nnz"]
        run.val_accuracy = state["val_accuracy"]
        run.last_score = None if state["last_score"] is None else Score(state["last_score"])

    def part() -> None:
        if state.get("part") is not None:
            own = [state["part"], *state.get("other_parts", [])][ranks.rank()]
            run.part = EpochPart(**{**own, "loss": own["loss"].to(run.device)})

    loaders: dict[str, Callable[[], object]] = {
        "position": position,
        "net": lambda: run.net.load_state_dict(state["net"]),
        "optimizer": lambda: run.optimizer.load_state_dict(state["optimizer"]),
        "method": lambda: run.method.load_state_dict(state["method"]),
        "step": lambda: run.step.load_state_dict(state["step"]),
        "ema": ema,
        "cost": cost,
        "scores": scores,
        "part": part,
    }
    # Checkpoints of older versions have no `step`.
    return {name: load for name, load in loaders.items() if name != "step" or "step" in state}


def _require_parts(run: "Run", state: Mapping[str, Any], where: str) -> None:
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
    sizes = [len(group["params"]) for group in run.optimizer.state_dict()["param_groups"]]
    groups = state["optimizer"].get("param_groups")
    found = [len(group.get("params", ())) for group in groups] if isinstance(groups, list) else None
    if found != sizes:
        raise CheckpointError(
            f"{where} does not fit this run: `optimizer` has parameter groups of {found} parameters, expected {sizes}"
        )


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
