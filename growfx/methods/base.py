"""What every method is: options in a frozen dataclass, run state in an object of its own, one clock.

A method is attached to a network and its optimizer, told of every optimizer step and, if it listens, of
every measured accuracy; it changes masks and says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from growfx.graph import MaskedGraph

__all__ = ["Method", "change_masks", "check_accuracy"]


class Method(ABC):
    """A way to choose masks during training. Subclasses are frozen dataclasses; their init fields are the
    options.

    Attributes:
        name: as in `growfx.methods.create`.
        epochs_per_round: length of a growth round; None for methods without rounds.
    """

    name: ClassVar[str]
    epochs_per_round: int | None

    @abstractmethod
    def attach(self, net: MaskedGraph, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int) -> None:
        """Draw the starting masks and set the clock.

        `total_steps`: optimizer steps of the (final) training, `steps_per_epoch`: of one epoch.
        Raises `ConfigError` where the options do not fit the network.
        """

    @abstractmethod
    def step(self) -> bool:
        """Count one optimizer step; call it after `optimizer.step()`. Returns True when masks changed."""

    @abstractmethod
    def report(self, accuracy: float, noise: float | None = None) -> None:
        """Tell the method a validation accuracy (fraction) and its standard deviation (None: unknown)."""

    @property
    @abstractmethod
    def trace(self) -> list[dict[str, Any]]:
        """One `{round, density, nnz, val_accuracy, fit}` a growth round, of plain JSON values."""

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
        """Continue exactly where `state_dict` was taken; call `attach` first.

        Raises `CheckpointError` for the state of another method or network.
        """


def check_accuracy(accuracy: float, noise: float | None) -> None:
    """Raise `ConfigError` unless `accuracy` is a fraction and `noise` a standard deviation or None."""
    from growfx.plateau import Point

    Point(1.0, float(accuracy), None if noise is None else float(noise))


def change_masks(net: MaskedGraph, optimizer: Optimizer, masks: Mapping[str, Tensor]) -> int:
    """Set `masks`; at every changed position the weight and the optimizer's state are zero. Returns how many
    changed.

    Optimizer state is any floating-point tensor of the parameter's shape in `optimizer.state[parameter]`.
    """
    changed = 0
    for name, mask in masks.items():
        layer = net.layers[name]
        differs = mask.to(layer.mask.device) ^ layer.mask
        count = int(differs.sum())
        if count:
            _clear(layer.parameter, differs)
            clear_state(optimizer, layer.parameter, differs)
        changed += count
    net.set_masks(masks)
    return changed


def clear_state(optimizer: Optimizer, parameter: nn.Parameter, where: Tensor) -> None:
    """Set the optimizer's state of `parameter` to zero at the positions `where` (bool, the parameter's
    shape)."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            _clear(value, where)


def _clear(values: Tensor, where: Tensor) -> None:
    with torch.no_grad():
        values.masked_fill_(where, 0.0)
