"""One model of a package other than timm and torchvision (a "guest" of the zoo): how it is built and called."""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from growfx.commands.zoo.outputs import leaves

__all__ = ["Draw", "Guest", "GuestForm", "Package"]


@dataclass(frozen=True)
class Draw:
    """Draw the inputs of one call.

    Attributes:
        batch: rows of every tensor drawn.
        seed: of the values.
        larger: whether the inputs are those of another size.
    """

    batch: int
    seed: int = 0
    larger: bool = False

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers of shape (batch, *shape)."""
        return torch.randn((self.batch, *shape), generator=self._generator())

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) of shape (batch, *shape)."""
        return torch.rand((self.batch, *shape), generator=self._generator())

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        """Integers (int64) in [low, high) of shape (batch, *shape)."""
        return torch.randint(low, high, (self.batch, *shape), generator=self._generator())

    def size(self, usual: int, other: int | None = None) -> int:
        """A length, height or width: `usual`, or `other` (default: half as much again) for inputs of another size."""
        return (usual + usual // 2 if other is None else other) if self.larger else usual

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Guest:
    """One model of a package.

    Attributes:
        build: from the imported package to the model, small and with random weights.
        inputs: what the model is called with, as `growfx.wrap` takes it: a tuple of arguments, a dict of keyword
            arguments, or both.
        masked: `masked` of `growfx.wrap`: parameters of layers that growfx does not know.
    """

    build: Callable[[Any], nn.Module]
    inputs: Callable[[Draw], Any]
    masked: tuple[str, ...] = ()


@dataclass(frozen=True)
class GuestForm:
    """What a guest is called with, of the usual or (`larger`) of another size."""

    guest: Guest
    larger: bool = False

    def inputs(self, batch: int, seed: int, device: str = "cpu") -> Any:
        """Example inputs with values of a seed; guests are always checked with values."""
        assert device == "cpu"
        return self.guest.inputs(Draw(batch, seed, self.larger))

    def others(self) -> list[GuestForm]:
        """The form of another size, if there is one."""
        other = GuestForm(self.guest, larger=True)
        return [other] if other.to_json() != self.to_json() else []

    def smaller_than(self, other: GuestForm) -> bool:
        """Whether a call takes less time than one with the other form."""
        return other.larger and not self.larger

    def to_json(self) -> list[list[int]]:
        """Shapes of the tensors at batch 1."""
        return [[*leaf.shape] for leaf in leaves(self.inputs(1, 0)) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Package:
    """A package and its models.

    Attributes:
        distribution: name to install it by.
        module: name to import it by.
        models: name -> model.
    """

    distribution: str
    module: str
    models: Mapping[str, Guest]

    @property
    def installed(self) -> bool:
        """Whether the package can be imported from here."""
        return importlib.util.find_spec(self.module) is not None

    def build(self, name: str) -> nn.Module:
        """The model `name`; every build has the same weights."""
        package = importlib.import_module(self.module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            random.seed(0)
            return self.models[name].build(package)
