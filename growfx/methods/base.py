"""The interface of all methods: options in a frozen dataclass, run state in a separate object, one clock.

A method is attached to a network and its optimizer, told of every optimizer step and, if it listens, of
every measured accuracy; it changes masks and says so. `growfx.train` asks it for one stage of training after
another; most have a single one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch.optim import Optimizer

from growfx.errors import CheckpointError, ConfigError, one_line
from growfx.masked.doors import as_masked_graph, require_values
from growfx.masked.graph import MaskedGraph
from growfx.methods.session import Session, Stage
from growfx.options import Unused, as_count

__all__ = [
    "Method",
    "check_accuracy",
    "check_clock",
    "check_net",
    "check_state",
    "not_attached",
    "reading_state",
]


class Method(ABC):
    """A way to choose masks during training. Subclasses are frozen dataclasses; their init fields are the
    options.

    Attributes:
        name: as in `growfx.methods.create`.
        changes_masks: False for one that never changes a mask.
        needs_whole: why it cannot work where each rank has a part of the weights (`fully_shard`); "" where it can.
        off_path: what it does with layers that no path crosses: "left" keeps their masks, as its rule ranks edges by
            paths; "spare" does so as long as they leave at least half of the edges to the others; "changed" treats
            them like any other (see `growfx.methods.scope`).
        trains_absent: why it cannot work where only values of present edges are kept (`storage` = "present"); "" where
            it can.
        warns_of_loss: False for one that is told which masks to take, or that chooses among the edges the network has:
            nobody is surprised when its masks replace others.
        stages: kinds of the stages (`Stage.kind`) that a run may have; None where they are not known, so that no
            option of `growfx.train` is said to have no effect on them. A class that overrides `next_stage` says them
            anew.
        unused: where its options have no effect, beside what the classes it is derived from say; rows are asked about a
            `growfx.methods.unused.Use`. Options given in vain are warned of when the method is attached.

    Example:
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> method = growfx.methods.create("set", density=0.5, update_every=1, drop_fraction=0.5)
        >>> method.attach(net, optimizer, total_steps=2, steps_per_epoch=1)
        >>> for _ in range(2):
        ...     net(torch.randn(8, 4)).square().sum().backward()
        ...     optimizer.step()
        ...     changed = method.step()
        ...     optimizer.zero_grad()
        >>> net.nnz
        4
    """

    name: ClassVar[str]
    changes_masks: ClassVar[bool] = True
    needs_whole: ClassVar[str] = "it computes with whole weights"
    off_path: ClassVar[str] = "spare"
    trains_absent: ClassVar[str] = ""
    warns_of_loss: ClassVar[bool] = True
    stages: ClassVar[tuple[str, ...] | None] = None
    unused: ClassVar[tuple[Unused, ...]] = ()

    # -- in any loop ----------------------------------------------------------------------------------------

    @abstractmethod
    def attach(self, net: MaskedGraph, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int) -> None:
        """Draw the starting masks and set the clock.

        `total_steps`: optimizer steps of the (final) training, `steps_per_epoch`: of one epoch. `optimizer` must train
        a masked weight of `net`; weights that other optimizers train take part like those of this one, and frozen
        weights (`requires_grad=False`) keep their masks and do not count in the method's density.

        Raises `ConfigError` where the options do not fit the network, where there is no mask to choose, for an
        optimizer of another network, and for methods that need more than one training, or its data.
        """

    @abstractmethod
    def step(self) -> bool:
        """Count one optimizer step; call it after `optimizer.step()`. Returns True when masks changed.

        A call without a step of the optimizer since the last one counts nothing: a loss scaler left it out.
        """

    @abstractmethod
    def report(self, accuracy: float, noise: float | None = None) -> None:
        """Tell the method a validation accuracy (fraction) and its standard deviation (None: unknown)."""

    # -- in growfx.train ------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, session: Session) -> None:
        """Start in a run: draw the starting masks, as `attach` does."""

    @abstractmethod
    def next_stage(self) -> Stage | None:
        """Return the stage to train now, the same one until `end_stage`; None when training is over."""

    @abstractmethod
    def end_stage(self, stage: Stage) -> None:
        """Do what follows `stage`, which was just trained; its accuracy was reported."""

    # -- facts ----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def needs_dense_gradient(self) -> bool:
        """Whether the step under way computes the gradient of absent edges too, which costs more."""

    @property
    @abstractmethod
    def trace(self) -> list[dict[str, Any]]:
        """`{round, density, nnz, val_accuracy, fit}` of every round or level, of plain JSON values."""

    @property
    @abstractmethod
    def growing(self) -> bool:
        """True while growth rounds go on."""

    @property
    @abstractmethod
    def stop_reason(self) -> str:
        """Why growth ended; empty before it has, and for methods without rounds."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all run state as tensors, numbers, texts, lists and dicts
        (`torch.load(weights_only=True)`)."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; call `attach` (or `begin`) first.

        Raises `CheckpointError` for the state of another method or network.
        """


# -- arguments ------------------------------------------------------------------------------------------------


def check_accuracy(accuracy: float, noise: float | None) -> None:
    """Raise `ConfigError` unless `accuracy` is a fraction and `noise` a standard deviation or None."""
    if not 0.0 <= float(accuracy) <= 1.0:
        raise ConfigError(f"`accuracy` is {accuracy!r}; allowed is a fraction in [0, 1]")
    if noise is not None and not 0.0 <= float(noise) < math.inf:
        raise ConfigError(f"`noise` is {noise!r}; allowed is a standard deviation (fraction, 0 or more) or None")


def check_clock(total_steps: int, steps_per_epoch: int) -> tuple[int, int]:
    """Return both as ints; `ConfigError` unless they are whole numbers (numpy's are too) from 1 up."""
    return as_count("total_steps", total_steps), as_count("steps_per_epoch", steps_per_epoch)


def check_net(method: Method, net: object) -> MaskedGraph:
    """Return the masked network that `net` is, or that was compiled or wrapped in `DistributedDataParallel`.

    Raises `ConfigError` for anything else, and for one on the meta device, without values.
    """
    return require_values(as_masked_graph(net, f"method `{method.name}`"), f"method `{method.name}`")


def check_state(state: Mapping[str, Any], name: str) -> None:
    """Raise `CheckpointError` unless `state` is of the method `name`."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"expected the state of method `{name}` (a dict), got {type(state).__name__}")
    if state.get("method") != name:
        raise CheckpointError(f"the state is of method `{state.get('method')}`, not `{name}`")


@contextmanager
def reading_state(name: str) -> Generator[None]:
    """Raise a `CheckpointError` for any error that a damaged state, or one of another version, causes its reader."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise CheckpointError(
            f"the state of method `{name}` cannot be read ({reason}): it is of another version of growfx, or damaged; "
            "continue with the version that wrote it, or start anew"
        ) from error


def not_attached(name: str) -> ConfigError:
    """Return the error of using a method before `attach`."""
    return ConfigError(f"method `{name}` is not attached; call `method.attach(net, optimizer, ...)` first")
