"""What every method is: options in a frozen dataclass, run state in an object of its own, one clock.

A method is attached to a network and its optimizer, told of every optimizer step and, if it listens, of
every measured accuracy; it changes masks and says so. `growfx.train` asks it for one stage of training after
another; most have a single one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from growfx.distributed import ranks
from growfx.distributed.sharded import is_sharded, own_part, part_of, reshard
from growfx.error_text import one_line
from growfx.errors import CheckpointError, ConfigError
from growfx.masked.layers import MaskedLayer
from growfx.masked.optimizers import clear_state, optimizers_of
from growfx.methods.scope import as_count
from growfx.methods.session import Session, Stage

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = [
    "Method",
    "change_masks",
    "check_accuracy",
    "check_clock",
    "check_net",
    "check_state",
    "collect_gradients",
    "dense_gradients",
    "find_shards",
    "not_attached",
    "reading_state",
]


class Method(ABC):
    """A way to choose masks during training. Subclasses are frozen dataclasses; their init fields are the
    options.

    Attributes:
        name: as in `growfx.methods.create`.
        changes_masks: False for one that leaves every mask as it is.
        needs_whole: why it cannot work where each rank has a part of the weights (`fully_shard`); "" where it can.
        off_path: what it does with layers that no path crosses: "left" keeps their masks, as its rule ranks edges by
            paths; "spare" does so as long as they leave at least half of the edges to the others; "changed" treats
            them like any other (see `growfx.methods.scope`).
        warns_of_loss: False for one that is told which masks to take, or that chooses among the edges the network has:
            nobody is surprised when its masks replace others.
    """

    name: ClassVar[str]
    changes_masks: ClassVar[bool] = True
    needs_whole: ClassVar[str] = "it computes with whole weights"
    off_path: ClassVar[str] = "spare"
    warns_of_loss: ClassVar[bool] = True

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


# -- what arrives ---------------------------------------------------------------------------------------------


def check_accuracy(accuracy: float, noise: float | None) -> None:
    """Raise `ConfigError` unless `accuracy` is a fraction and `noise` a standard deviation or None."""
    from growfx.methods.growth.plateau import Point

    Point(1.0, float(accuracy), None if noise is None else float(noise))


def check_clock(total_steps: int, steps_per_epoch: int) -> tuple[int, int]:
    """Return both as ints; `ConfigError` unless they are whole numbers (numpy's are too) from 1 up."""
    return as_count("total_steps", total_steps), as_count("steps_per_epoch", steps_per_epoch)


def check_net(method: Method, net: object) -> MaskedGraph:
    """Return the masked network that `net` is, or that was compiled or wrapped in `DistributedDataParallel`.

    Raises `ConfigError` for anything else.
    """
    from growfx.masked.doors import as_masked_graph

    return as_masked_graph(net, f"method `{method.name}`")


def check_state(state: Mapping[str, Any], name: str) -> None:
    """Raise `CheckpointError` unless `state` is of the method `name`."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"expected the state of method `{name}` (a dict), got {type(state).__name__}")
    if state.get("method") != name:
        raise CheckpointError(f"the state is of method `{state.get('method')}`, not `{name}`")


@contextmanager
def reading_state(name: str) -> Generator[None]:
    """Turn what a state of another version, or a damaged one, leads its reader into, into a `CheckpointError`."""
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


def find_shards(method: Method, net: MaskedGraph) -> None:
    """Find out whether `fully_shard` spread the weights of `net`, and let its layers know.

    Raises `ConfigError` where it did in a way that masks cannot follow, or `method` needs weights whole.
    """
    reshard(net)
    net.find_shards()
    spread = [name for name, layer in net.layers.items() if is_sharded(layer.parameter)]
    if not spread:
        return
    if method.needs_whole:
        from growfx.methods import kind_of, names

        allowed = ", ".join(f"`{name}`" for name in names() if not kind_of(name).needs_whole)
        raise ConfigError(
            f"the weights of `{spread[0]}` are spread over processes (`fully_shard`), which method `{method.name}` "
            f"does not work with: {method.needs_whole}; allowed are {allowed}, or `DistributedDataParallel`, which "
            "keeps weights whole"
        )
    whole = [name for name in net.layers if name not in spread]
    if whole:
        raise ConfigError(
            f"the weights of `{spread[0]}` are spread over processes (`fully_shard`), those of `{whole[0]}` are not; "
            "masked layers are all spread or none, so call `fully_shard` on the network itself last"
        )
    net.settle()


# -- masks ----------------------------------------------------------------------------------------------------


def change_masks(net: MaskedGraph, optimizer: Optimizer, masks: Mapping[str, Tensor]) -> int:
    """Set `masks`; at every changed position the weight and the optimizer's state are zero. Returns how many
    changed.

    Optimizer state is any floating-point tensor of the parameter's shape in `optimizer.state[parameter]`, of
    `optimizer` and of every other one that steps the parameter (one inside a wrapper, say). Ranks that train the
    network together compare their masks then; `MaskError` where they differ.
    """
    changed = 0
    for name, mask in masks.items():
        layer = net.layers[name]
        differs = mask.to(layer.mask.device) ^ layer.mask
        count = int(differs.sum())
        if count:
            own_part(layer.parameter).masked_fill_(part_of(differs, layer.parameter), 0.0)
            for each in {optimizer, *optimizers_of(layer.parameter)}:
                clear_state(each, layer.parameter, differs)
        changed += count
    net.set_masks(masks)
    if ranks.is_shared(net):
        ranks.require_same_masks(net)
    return changed


# -- gradients ------------------------------------------------------------------------------------------------


def collect_gradients(layers: Iterable[MaskedLayer], wanted: bool) -> None:
    """Let the next backward passes leave the gradient of absent edges (or not), and forget the last one."""
    for layer in layers:
        layer.collects_gradient = wanted
        layer.dense_gradient = None


def dense_gradients(layers: Mapping[str, MaskedLayer]) -> dict[str, Tensor]:
    """Return the gradient of every weight, present or absent, of the step just made; shapes of the weights.

    Collected since `collect_gradients(..., True)`: of the whole accumulation window, as the optimizer saw it. Zero
    for a layer that took no part in the step.
    """
    found = {}
    for name, layer in layers.items():
        if layer.dense_gradient is None and layer.collects_gradient:
            layer.take_dense_gradient()  # an optimizer that is none of torch's, whose step nobody announces
        gradient = layer.dense_gradient
        found[name] = torch.zeros_like(layer.parameter.detach()) if gradient is None else gradient
    return found
