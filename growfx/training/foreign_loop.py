"""A method in a training loop that is not growfx's: what the callbacks of such loops share.

The method is told of a step by the optimizer itself, so that accumulated batches and steps that a gradient scaler
skips do not count, even where the loop counts a step.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from growfx.errors import ConfigError
from growfx.masked.graph import MaskedGraph
from growfx.methods.starting import resuming

if TYPE_CHECKING:
    from growfx.methods.base import Method

__all__ = ["ForeignLoop", "find_net", "find_optimizer"]


@dataclass(frozen=True)
class _Attached:
    net: MaskedGraph
    optimizer: Optimizer


class ForeignLoop:
    """A method that follows the optimizer of a loop from `start` to `stop`.

    Attributes:
        method: from `growfx.methods.create`, not yet attached; one that works step by step.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._attached: _Attached | None = None
        self._unhook: weakref.finalize[Any, Any] | None = None

    @property
    def started(self) -> bool:
        """True between `start` and `stop`."""
        return self._attached is not None

    @property
    def net(self) -> MaskedGraph | None:
        """The network under training; None before `start` and after `stop`."""
        return self._attached.net if self._attached else None

    def start(
        self,
        net: MaskedGraph,
        optimizer: Optimizer,
        *,
        total_steps: int,
        steps_per_epoch: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Attach the method; with `state`, continue on the masks, weights and optimizer state that are there.

        Raises `ConfigError` as `Method.attach`, `CheckpointError` for the state of another method or network.
        """
        self.stop()
        clock = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
        if state is None:
            self.method.attach(net, optimizer, **clock)
        else:
            # Attaching draws the starting masks: what the loop has restored is put back after it.
            weights = {name: value.clone() for name, value in net.state_dict().items()}
            progress = copy.deepcopy(optimizer.state_dict())
            with resuming():
                self.method.attach(net, optimizer, **clock)
            net.load_state_dict(weights)
            optimizer.load_state_dict(progress)
            self.method.load_state_dict(state)
        self._attached = _Attached(net, optimizer)
        self._follow()

    def _follow(self) -> None:
        own = weakref.ref(self)

        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            loop = own()
            if loop is not None and loop._attached is not None and loop._attached.optimizer is optimizer:
                loop.method.step()

        # Hooks of one optimizer run before those of all; growfx's own, which see to zeros, have to be first.
        handle = register_optimizer_step_post_hook(stepped)
        self._unhook = weakref.finalize(self, handle.remove)

    def report(self, metrics: Mapping[str, Any], name: str) -> None:
        """Tell the method the accuracy (fraction) that `metrics` has under `name`.

        Raises `ConfigError` where it has none, or no fraction.
        """
        if name not in metrics:
            known = ", ".join(f"`{key}`" for key in sorted(metrics)) or "none"
            raise ConfigError(f"`monitor` = `{name}` is not a metric of this validation; expected one of {known}")
        # Validation runs without gradients, often in inference mode, whose tensors training could not use.
        with torch.inference_mode(False), torch.enable_grad():
            self.method.report(float(metrics[name]))

    def stop(self) -> None:
        """Let go of network and optimizer; the method keeps its state."""
        if self._unhook is not None:
            self._unhook()
        self._attached = self._unhook = None


def find_net(module: nn.Module, path: str | None) -> MaskedGraph:
    """Return the masked network at `path` in `module` (as in `get_submodule`), or the only one for None.

    Raises `ConfigError` where there is none, or several and no path.
    """
    found = {name: part for name, part in module.named_modules() if isinstance(part, MaskedGraph)}
    listed = ", ".join(f"`{name}`" for name in found) or "none"
    if path is not None:
        if path not in found:
            raise ConfigError(
                f"`net` = `{path}` is not a growfx.MaskedGraph of `{type(module).__name__}`; expected one of {listed}"
            )
        return found[path]
    if len(found) != 1:
        raise ConfigError(
            f"`{type(module).__name__}` has {len(found)} growfx.MaskedGraph ({listed}); "
            "wrap the model with growfx.wrap, and where there are several say which one by `net`"
        )
    return next(iter(found.values()))


def find_optimizer(net: MaskedGraph, optimizers: Iterable[Optimizer]) -> Optimizer:
    """Return the optimizer that trains the masked weights, without what a loop has put around it.

    Raises `ConfigError` where none does, or several.
    """
    masked = {id(layer.trained) for layer in net.layers.values()}
    found: list[Optimizer] = []
    for optimizer in optimizers:
        while isinstance(inner := vars(optimizer).get("optimizer"), Optimizer):
            optimizer = inner
        if any(id(parameter) in masked for group in optimizer.param_groups for parameter in group["params"]):
            found.append(optimizer)
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} optimizers train the masked weights; a method follows one: give all masked weights to it"
        )
    return found[0]
