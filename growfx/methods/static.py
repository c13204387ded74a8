"""A random mask of fixed density, drawn once: the control for every method that chooses edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim import Optimizer

from growfx.density import DISTRIBUTIONS, random_masks
from growfx.errors import CheckpointError, ConfigError
from growfx.methods.base import Method, change_masks, check_accuracy
from growfx.options import check_ranges, option

if TYPE_CHECKING:
    from growfx.graph import MaskedGraph

__all__ = ["Static"]


@dataclass
class _State:
    steps: int = 0


@dataclass(frozen=True)
class Static(Method):
    """Random masks of `distribution` ("erk", "er", "uniform") at `density`, drawn from `seed`."""

    name: ClassVar[str] = "static"

    density: float = option(0.1, low=0, high=1, open_low=True)
    distribution: str = option("erk", choices=tuple(DISTRIBUTIONS))
    seed: int = option(0, low=0, high=2**63 - 1)
    epochs_per_round: int | None = field(default=None, init=False)
    _state: _State | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_ranges(self)

    def attach(self, net: MaskedGraph, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int) -> None:
        """Draw the masks; the clock does not matter."""
        shapes = {name: tuple(layer.mask.shape) for name, layer in net.layers.items()}
        change_masks(net, optimizer, random_masks(shapes, self.density, self.distribution, self.seed))
        object.__setattr__(self, "_state", _State())

    def step(self) -> bool:
        """Count a step; masks never change."""
        self._attached().steps += 1
        return False

    def report(self, accuracy: float, noise: float | None = None) -> None:
        """Check the values; nothing depends on them."""
        check_accuracy(accuracy, noise)

    @property
    def trace(self) -> list[dict[str, Any]]:
        """Empty: there are no rounds."""
        return []

    @property
    def growing(self) -> bool:
        """False: there are no rounds."""
        return False

    @property
    def stop_reason(self) -> str:
        """Empty: there are no rounds."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps."""
        return {"method": self.name, "steps": self._attached().steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue; the masks themselves are in the network's state dict."""
        own = self._attached()
        if state.get("method") != self.name:
            raise CheckpointError(f"the state is of method `{state.get('method')}`, not `{self.name}`")
        own.steps = int(state["steps"])

    def _attached(self) -> _State:
        if self._state is None:
            raise ConfigError(f"method `{self.name}` is not attached; call `method.attach(net, optimizer, ...)` first")
        return self._state
