"""Lightning callback that runs a step-by-step method in a Lightning `Trainer`.

Needs the package `lightning` (`pip install lightning`); importing this module without it is a
`ConfigError`.
"""

from __future__ import annotations

import importlib
import math
import weakref
from typing import TYPE_CHECKING, Any

from growfx.errors import ConfigError
from growfx.training.foreign_loop import ForeignLoop, find_net, find_optimizer

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph
    from growfx.methods.base import Method

__all__ = ["SparseTraining"]

try:
    _pytorch: Any = importlib.import_module("lightning.pytorch")
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    raise ConfigError("growfx.lightning needs the package `lightning`: pip install lightning") from error


class SparseTraining(_pytorch.Callback):
    """Attach a method to the masked network of a LightningModule, and follow its optimizer.

    A step counts when the optimizer made it: neither accumulated batches nor steps skipped by a gradient scaler do.
    The method's state is in Lightning's checkpoints; `trainer.fit(..., ckpt_path=...)` continues exactly.

    Args:
        method: from `growfx.methods.create`; methods that train several times over are a `ConfigError`.
        monitor: name of the logged validation accuracy (a fraction) that is reported to the method; None reports
            nothing.
        net: attribute path of the `growfx.MaskedGraph`; None finds the only one.
        total_steps: optimizer steps of the training; None takes Lightning's estimate.
    """

    def __init__(
        self, method: Method, *, monitor: str | None = None, net: str | None = None, total_steps: int | None = None
    ) -> None:
        self.loop = ForeignLoop(method)
        self.monitor, self.net, self.total_steps = monitor, net, total_steps
        self._state: dict[str, Any] | None = None
        self._trained: weakref.ref[MaskedGraph] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the method; weights and masks of a checkpoint are there by now, the optimizer's state follows."""
        net = find_net(pl_module, self.net)
        trainer.fit_loop.setup_data()  # else the number of batches is not known yet
        total = trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        if not math.isfinite(total):
            raise ConfigError(
                "expected a training with an end, got one without; give `total_steps`, or `max_epochs` to the Trainer"
            )
        batches = trainer.num_training_batches
        steps = math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else int(total)
        if self._trained is not None and self._trained() is not net:
            self._state = None  # a second model: the state is that of the first
        self.loop.start(
            net,
            find_optimizer(net, trainer.optimizers),
            total_steps=int(total),
            steps_per_epoch=max(1, steps),
            state=self._state,
        )
        self._state, self._trained = None, None

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the accuracy."""
        if self.monitor is not None and self.loop.started and not trainer.sanity_checking:
            self.loop.report(trainer.callback_metrics, self.monitor)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Release the optimizer; a further `fit` of the same network continues."""
        net = self.loop.net
        if net is not None:
            self._state, self._trained = self.loop.method.state_dict(), weakref.ref(net)
        self.loop.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state, for Lightning's checkpoint."""
        return self.loop.method.state_dict() if self.loop.started else self._state or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until the method is attached."""
        self._state, self._trained = state_dict, None
