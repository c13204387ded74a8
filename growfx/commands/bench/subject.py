"""What `growfx bench` measures: a stored network, and how to build it again and again."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.artifact.info import ArtifactInfo
from growfx.artifact.remembered_inputs import as_example, inputs_from
from growfx.artifact.writer import inspect, load_masks
from growfx.commands.inspection import kind_of, nothing_there, place_of, recorded_format, require_builder
from growfx.commands.job import reopen, saying_how_inputs_are_stated
from growfx.deploy.loading import load
from growfx.deploy.saving import save
from growfx.errors import ConfigError
from growfx.masked.graph import MaskedGraph
from growfx.models.build import create_model, default_input_shape
from growfx.passes.mask.swap import unwrap, wrap
from growfx.recorded.inputs import Inputs

__all__ = ["Subject", "opened_subject"]


@dataclass(frozen=True)
class Subject:
    """A network in an artifact.

    Attributes:
        given: the path or name that was asked for.
        kind: what that is: `artifact`, `run` or `model`.
        artifact: where the artifact lies.
        info: what it holds.
        example: inputs it takes.
        template: an instance to load into, where the artifact cannot build the model itself.
    """

    given: str
    kind: str
    artifact: Path
    info: ArtifactInfo
    example: Inputs
    template: nn.Module | None

    @property
    def name(self) -> str:
        """The model's name, else its class."""
        if self.info.model is not None:
            return str(self.info.model["name"])
        return "own model" if self.template is None else type(self.template).__name__

    def load(self, **options: Any) -> nn.Module:
        """A new instance; options as `growfx.load` takes them."""
        return load(self.artifact, model=copy.deepcopy(self.template), **options)

    def masked(self) -> MaskedGraph:
        """A new instance under the artifact's masks, in evaluation mode."""
        net = wrap(self.load(), as_example(self.example))
        masks = load_masks(self.artifact)
        net.set_masks({name: mask for name, mask in masks.items() if name in net.layers})
        return net.eval()

    def inputs(self, batch: int, dtype: torch.dtype) -> Inputs:
        """Random inputs of this batch size; the same in every process.

        Raises:
            ConfigError: the network's inputs have no batch size that could change.
        """
        found = self.example.with_batch(batch)
        if found.batch != batch:
            raise ConfigError(f"`batch` = {batch}, but the network's inputs have no batch size that can change")
        cast = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
        return Inputs(*pytree.tree_map(cast, (found.args, dict(found.kwargs)))).redrawn(0)


@contextmanager
def opened_subject(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    img_size: int | None = None,
    density: float | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Generator[Subject]:
    """The network of an artifact (also `hf-hub:USER/NAME`), a run's newest checkpoint, or a model's name.

    Args:
        path: what to open.
        model: an instance of the network's class, for an artifact that does not name a timm or torchvision model.
        example_inputs: inputs the network takes; by default images as it was trained on, else as it states itself.
        img_size: height and width of the images, other than those.
        density: of the random ERK masks that a model by name gets.
        model_kwargs: arguments of a model by name.

    Raises:
        ArtifactError, CheckpointError, ConfigError, DataError: nothing of that name, damaged, or options that do not go
            with it.
    """
    if example_inputs is not None and img_size is not None:
        raise ConfigError("`example_inputs` and `img_size` exclude each other: the inputs have a size already")
    place = place_of(path)
    kind = kind_of(place)
    if kind == "other":
        if place.exists():
            raise nothing_there(path)
        kind = "model"
    if kind != "model" and (density is not None or model_kwargs):
        raise ConfigError(f"`{path}` is stored with its masks; `density` and model arguments are for a model by name")
    given = None if example_inputs is None else _as_tuple(example_inputs)
    if kind == "artifact":
        info = inspect(place)
        if model is None:
            require_builder(info, place)
        example = Inputs(given, {}) if given else _stored_example(info, model, place, img_size)
        yield Subject(str(path), kind, place, info, example, model)
        return
    if kind == "run":
        net, _ = reopen(place)
        known = net.example()
        example = Inputs(given, {}) if given else Inputs(_resized(known.args, img_size), known.kwargs)
    else:
        built = create_model(str(path), **(model_kwargs or {})).eval()
        example = Inputs(given or _resized((torch.zeros(default_input_shape(built)),), img_size), {})
        with saying_how_inputs_are_stated() if given is None else nullcontext():
            net = wrap(built, example, density=1.0 if density is None else density)
    with tempfile.TemporaryDirectory() as folder:
        info = save(net, Path(folder) / "artifact")
        # A model of the caller's own module is not built by reading an artifact.
        named = info.model is not None and info.model["library"] != "python"
        template = None if named else unwrap(net)
        yield Subject(str(path), kind, Path(folder) / "artifact", info, example, template)


def _as_tuple(inputs: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else inputs


def _stored_example(info: ArtifactInfo, model: nn.Module | None, place: Path, img_size: int | None) -> Inputs:
    """Inputs like those the artifact tells of, else images as it was trained on."""
    if info.inputs is not None:
        inputs = inputs_from(info.inputs)
        return inputs if img_size is None else Inputs(_resized(inputs.args, img_size), inputs.kwargs)
    return Inputs(_images(info, model, place, img_size), {})


def _images(info: ArtifactInfo, model: nn.Module | None, place: Path, img_size: int | None) -> tuple[Tensor, ...]:
    shape = recorded_format(info.provenance, load(place, model=copy.deepcopy(model))).input_size
    return _resized((torch.zeros(1, *shape),), img_size)


def _resized(example: tuple[Any, ...], img_size: int | None) -> tuple[Any, ...]:
    if img_size is None:
        return example
    if img_size < 1:
        raise ConfigError(f"`img_size` = {img_size} is out of range; allowed: 1 and more")
    if len(example) != 1 or not isinstance(example[0], Tensor) or example[0].ndim != 4:
        raise ConfigError("`img_size` is for networks that take one batch of images; give `example_inputs`")
    batch, channels, *_ = example[0].shape
    return (torch.zeros(batch, channels, img_size, img_size),)
