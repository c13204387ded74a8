"""Hugging Face `Trainer` callback that runs a step-by-step method.

Needs the package `transformers` (`pip install 'transformers[torch]'`); importing this module without it is a
`ConfigError`.
"""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from growfx.errors import CheckpointError, ConfigError
from growfx.notices import warn_once
from growfx.training.foreign_loop import ForeignLoop, find_net, find_optimizer

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph
    from growfx.methods.base import Method

__all__ = ["STATE_FILE", "SparseTraining"]

STATE_FILE = "growfx_method.pt"

try:
    _transformers: Any = importlib.import_module("transformers")
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ConfigError(
        "growfx.hf_trainer needs the package `transformers`: pip install 'transformers[torch]'"
    ) from error


class SparseTraining(_transformers.TrainerCallback):
    """Attach a method to the masked network in a Trainer's model, and follow its optimizer.

    A step counts when the optimizer made it: neither accumulated batches nor steps skipped by a gradient scaler do.
    The method's state lies beside the Trainer's in every `checkpoint-N` folder, as `growfx_method.pt`;
    `trainer.train(resume_from_checkpoint=...)` continues exactly.

    Args:
        method: from `growfx.methods.create`; methods that train several times over are a `ConfigError`.
        monitor: metric of `Trainer.evaluate` (such as `eval_accuracy`, a fraction) that is reported to the method;
            None reports nothing.
        net: attribute path of the `growfx.MaskedGraph`; None finds the only one.
        resume_from: the checkpoint folder that training continues from, where it is not in `output_dir`: the Trainer
            does not tell its callbacks.
    """

    def __init__(
        self,
        method: Method,
        *,
        monitor: str | None = None,
        net: str | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        self.loop = ForeignLoop(method)
        self.monitor, self.net, self.resume_from = monitor, net, resume_from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the method; what a checkpoint holds of weights, masks and optimizer is there by now."""
        net = find_net(kwargs["model"], self.net)
        if self.resume_from is not None and not state.global_step:
            warn_once(
                f"`resume_from` = `{self.resume_from}` has no effect on a training that starts at its first step; give "
                "the folder to `trainer.train(resume_from_checkpoint=...)` too",
                [],
            )
        steps = _steps_of_epoch(kwargs.get("train_dataloader"), args.gradient_accumulation_steps) or state.max_steps
        self.loop.start(
            net,
            find_optimizer(net, [kwargs["optimizer"]]),
            total_steps=state.max_steps,
            steps_per_epoch=steps,
            state=self._recorded(args, state, net) if state.global_step else None,
        )

    def _recorded(self, args: Any, state: Any, net: MaskedGraph) -> dict[str, Any]:
        """The method's state in the checkpoint that the Trainer continues from."""
        given = self.resume_from or (
            args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None
        )
        path = Path(given or Path(args.output_dir) / f"checkpoint-{state.global_step}") / STATE_FILE
        try:
            recorded = torch.load(path, map_location="cpu", weights_only=True)
            digest, method = recorded["mask_digest"], recorded["method"]
        except Exception as error:  # the unpickler raises whatever the damage leads it into
            reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise CheckpointError(
                f"training continues from step {state.global_step}, but `{path}` {reason}; give the folder of the "
                "checkpoint as `resume_from`"
            ) from error
        if digest != net.mask_digest():
            raise CheckpointError(
                f"`{path}` is of other masks than the network's; give the folder that training continues from as "
                "`resume_from`"
            )
        return method

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the method's state into the checkpoint, whole or not at all."""
        if not self.loop.started or not state.is_world_process_zero:
            return
        net = find_net(kwargs["model"], self.net)
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
        part = path.with_suffix(".new")
        try:
            torch.save({"mask_digest": net.mask_digest(), "method": self.loop.method.state_dict()}, part)
            os.replace(part, path)
        except OSError as error:
            raise CheckpointError(f"`{path}` cannot be written ({error.strerror})") from error

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the accuracy."""
        if self.monitor is not None and self.loop.started:
            self.loop.report(kwargs["metrics"], self.monitor)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the optimizer."""
        self.loop.stop()


def _steps_of_epoch(loader: Any, accumulated: int) -> int | None:
    """Optimizer steps of an epoch; None where the loader has no length."""
    try:
        return max(1, math.ceil(len(loader) / accumulated))
    except TypeError:
        return None
