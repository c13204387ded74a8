"""Lottery tickets: the masks of an earlier run or artifact, trained from the initial weights of this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from growfx.artifact.reader import load_masks
from growfx.errors import ConfigError
from growfx.masked.layers import MaskedLayer
from growfx.methods.stepwise.course import Course, Stepwise
from growfx.options import option
from growfx.runs.checkpoint import read
from growfx.runs.folder import RunFolder
from growfx.selection.choose import top
from growfx.selection.edge_keys import EdgeKeys

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["Ticket"]

_SHOWN = 3
_WEIGHTS = ("weight", "in_proj_weight")


@dataclass(frozen=True)
class Ticket(Stepwise):
    """Trains the final masks of `source`, which never change (Frankle & Carbin, The Lottery Ticket Hypothesis, 2019).

    The three checks of a winning ticket, on the masks that a run has found:

    * with the `seed` of that run: the masks from the very weights they were found from;
    * with another `seed` of the run: the same masks from fresh weights;
    * with `shuffle`: masks with the same number of edges in every layer, at random places.

    Layers that no path crosses take the masks of the source too; frozen layers keep their own.

    Attributes:
        source: folder of a finished run, or an artifact (its folder or weights file). It is read at the start of a run,
            and again when the run is continued.
        shuffle: put the edges of every layer at random places in it.
        seed: of the shuffle.
        sign_in: train each present weight as a product whose scale is reset every so many epochs until the end of
            training, so that signs can flip (`growfx.methods.sign_in`); 0 trains weights as they are. Schedulers of
            learning rates are made after `attach`, which adds the scales to the optimizer.
    """

    name: ClassVar[str] = "ticket"
    off_path: ClassVar[str] = "changed"
    warns_of_loss: ClassVar[bool] = False
    source: str = option("", unset="none: it must be given")
    shuffle: bool = False
    sign_in: int = option(0, low=0)
    seed: int = option(0, low=0, high=2**63 - 1)

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        if not self.source:
            raise ConfigError(
                "method `ticket` has no `source`; give the path of a finished run or of an artifact to take masks from"
            )
        masks = read_masks(Path(self.source))
        _check_fit(course.net, course.layers, masks, self.source)
        own = {name: masks[name] for name in course.layers}
        return {name: self._shuffled(name, mask) if self.shuffle else mask for name, mask in own.items()}

    def _shuffled(self, name: str, mask: Tensor) -> Tensor:
        # scores that are all equal leave the choice to the keys
        equal = {name: torch.zeros(mask.shape, device="cpu")}
        return top(equal, int(mask.sum()), EdgeKeys(self.seed, "shuffled ticket")).masks[name]

    def _update(self, course: Course) -> None:
        return None

    def _wants_gradient(self, course: Course, step: int) -> bool:
        return False


def read_masks(path: Path) -> dict[str, Tensor]:
    """Return the masks of a finished run (of its artifact, else of its newest checkpoint) or of an artifact.

    Layer name -> bool tensor of the weight's shape, on the CPU.

    Raises:
        ConfigError: nothing is there, or the run has not finished.
        ArtifactError: no artifact, or a damaged one.
        CheckpointError: a damaged run.
    """
    if not path.exists():
        raise ConfigError(f"`source` = `{path}` is not there; give the path of a finished run or of an artifact")
    if not (path / "log.jsonl").exists() and not (path / "checkpoint").exists():
        return load_masks(path)
    folder = RunFolder.open(path)
    if folder.read_json("result.json") is None:
        raise ConfigError(
            f"`source` = `{path}` is a run that has not finished, so its masks are not its last; continue it first"
        )
    if (path / "artifact").exists():
        return load_masks(path / "artifact")
    net = read(folder.checkpoints.latest)["net"]
    layers = [key.removesuffix(".mask") for key in net if key.endswith(".mask")]
    return {name: net[f"{name}.mask"] for name in layers if any(f"{name}.{key}" in net for key in _WEIGHTS)}


def _check_fit(net: MaskedGraph, layers: Mapping[str, MaskedLayer], masks: Mapping[str, Tensor], source: str) -> None:
    """Raise `ConfigError` unless the masks are those of the network's layers, and there are some for all `layers`."""
    # a checkpoint names layers with tied weights once each
    known = {name for name, module in net.named_modules(remove_duplicate=False) if isinstance(module, MaskedLayer)}
    missing = [f"`{name}`" for name in layers if name not in masks]
    extra = [f"`{name}`" for name in masks if name not in known | set(net.layers)]
    complaints = []
    if missing:
        complaints.append(f"it has no masks of {_listed(missing)}")
    if extra:
        complaints.append(f"the network has no masked layers {_listed(extra)}")
    for name, layer in layers.items():
        shape, own = tuple(masks[name].shape) if name in masks else None, tuple(layer.mask.shape)
        if shape is not None and shape != own:
            complaints.append(f"`{name}` is {shape} there and {own} in the network")
    if complaints:
        raise ConfigError(
            f"the masks of `source` = `{source}` do not fit the network: {'; '.join(complaints[:_SHOWN])}; "
            "train the model they come from, with the same number of classes and the same layers excluded"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
