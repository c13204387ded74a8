"""Warn of training options that were given and have no effect in the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from growfx.methods.unused import stages_of
from growfx.notices import warn_once
from growfx.options import TrainOptions, Unused, given_options, unused_options
from growfx.training.run import Run

__all__ = ["Training", "unused_in", "warn_of_unused"]

_COSINES = frozenset({"round", "level", "search"})  # stages with a cosine, whatever the schedule is


@dataclass(frozen=True)
class Training:
    """What is known of a run before it starts: what the rows of the table are asked about.

    Attributes:
        options: of the run.
        stages: kinds of its stages, see `growfx.methods.base.Method`; None for a method of others, whose are not known.
        saved: whether it has a run folder.
        device: type of the device; "" where it is not known yet.
        layouts: whether a weight has the four dimensions that `channels_last` orders.
    """

    options: TrainOptions
    stages: tuple[str, ...] | None
    saved: bool = True
    device: str = ""
    layouts: bool = True


def _no_rounds(run: Training) -> str:
    there = run.stages is None or "round" in run.stages
    return "" if there else "with a method that has no growth rounds"


def _no_fall(run: Training) -> str:
    cosine = run.stages is None or not _COSINES.isdisjoint(run.stages)
    falls = cosine or run.options.schedule in ("cosine", "linear")
    return "" if falls else f"with `schedule` = `{run.options.schedule}`, which does not end at it"


def _no_steps(run: Training) -> str:
    schedule = run.options.schedule
    return "" if schedule == "step" else f"with `schedule` = `{schedule}`; it applies to `step` only"


def _no_momentum(run: Training) -> str:
    from timm import optim

    try:
        info = optim.get_optimizer_info(run.options.optimizer)  # pyright: ignore[reportPrivateImportUsage]
    except ValueError:
        return ""  # refused where it is made
    return "" if info.has_momentum else f"with `optimizer` = `{run.options.optimizer}`, which has no momentum"


def _no_folder(run: Training) -> str:
    return "" if run.saved else "without a run folder; give `out`"


TABLE: Final = (
    Unused(("round_lr", "round_warmup", "ema_decay"), _no_rounds),
    Unused(("min_lr",), _no_fall),
    Unused(("decay_rate",), _no_steps),
    Unused(("momentum",), _no_momentum),
    Unused(("keep_checkpoints", "checkpoint_minutes", "overwrite", "about"), _no_folder),
    Unused(
        ("deterministic",),
        lambda run: (
            "" if run.device in ("", "cpu") else f"on `{run.device}`; it decides how layers choose kernels on a CPU"
        ),
    ),
    Unused(
        ("channels_last",),
        lambda run: "" if run.layouts else "on a network without weights of four dimensions (images)",
    ),
)


def unused_in(run: Training, beside: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return a message for each option that was given and has no effect.

    `beside`: arguments that were given and are not among `TrainOptions`.
    """
    return unused_options(given_options(run.options) | dict(beside or {}), TABLE, run)


def warn_of_unused(run: Run, *, saved: bool, beside: Mapping[str, Any]) -> None:
    """Warn of each option of a run that was given and has no effect; `beside`: arguments, those left out among them."""
    weights = [*run.net.parameters(), *(layer.mask for layer in run.net.layers.values())]
    layouts = any(tensor.ndim == 4 for tensor in weights)
    known = Training(run.options, stages_of(run.method), saved, run.device.type, layouts)
    for message in dict.fromkeys(unused_in(known, {name: value for name, value in beside.items() if value}).values()):
        warn_once(message, [])
