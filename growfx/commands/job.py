"""A job: a model spec and a DATA spec put together into a masked network, an input format and loaders.

What the commands share; `growfx.training` knows nothing of specs.
"""

import importlib
import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from growfx.commands.starting_weights import StartingWeights
from growfx.data.loaders import InputFormat, fit_input, make_loader
from growfx.data.sources import DataSource, open_data
from growfx.data.unused import Reading, warn_of_unused
from growfx.distributed import ranks
from growfx.errors import CheckpointError, ConfigError, TraceError
from growfx.masked.graph import MaskedGraph
from growfx.models.build import create_model
from growfx.options import DataOptions, as_json, given_options
from growfx.passes.mask.swap import wrap
from growfx.passes.record.data import RefusedInputsError
from growfx.runs.checkpoint import read
from growfx.runs.folder import RunFolder

__all__ = ["Job", "assemble", "reopen", "saying_how_inputs_are_stated", "wrap_for"]


@dataclass(frozen=True)
class Job:
    """A masked network with the data it is trained on.

    Attributes:
        exclude: patterns of names of layers that have no mask.
        weights_from: which weights the model started from, see `StartingWeights.build`; None for initial ones.
    """

    net: MaskedGraph
    source: DataSource
    form: InputFormat
    options: DataOptions
    exclude: tuple[str, ...] = ()
    weights_from: Mapping[str, Any] | None = None

    def loader(self, split: str, *, train: bool = False) -> DataLoader[Any]:
        """A loader of one split, see `growfx.data.loaders.make_loader`."""
        pin = torch.accelerator.is_available()
        return make_loader(self.source, split, self.form, self.options, train=train, pin_memory=pin)

    def about(self) -> dict[str, Any]:
        """What `config.json` says of data and input."""
        source = self.source
        facts = {"spec": source.spec, "fingerprint": source.fingerprint, "classes": list(source.classes)}
        excluded = {"exclude": list(self.exclude)} if self.exclude else {}
        weights = {"weights_from": dict(self.weights_from)} if self.weights_from else {}
        return {"data": {**facts, **as_json(self.options)}, "input": self.form.as_json(), **excluded, **weights}


def assemble(
    model: str,
    data: str,
    options: DataOptions,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    exclude: Sequence[str] = (),
    weights: StartingWeights | None = None,
) -> Job:
    """Open the data, build the model with its number of classes and an image size that fits, and wrap it.

    Args:
        model, data: specs as on the command line.
        model_kwargs: arguments of the model; they go before what the data suggests.
        seed: of the initial weights.
        exclude: patterns of names of layers that get no mask.
        weights: where the initial weights come from, if not from `seed`.

    Raises:
        DataError, ConfigError, TraceError, CheckpointError: as `open_data`, `create_model`, `wrap` and
            `StartingWeights.build`.
    """
    if options.download:
        ranks.on_first(lambda: open_data(data, options))  # the others find it there
    source = open_data(data, options)
    torch.manual_seed(seed)
    kwargs = dict(model_kwargs or {})
    if _takes(model, "num_classes"):
        kwargs.setdefault("num_classes", len(source.classes))
    built = create_model(model, **kwargs)
    if options.img_size is not None and _fixed_size(built) and "img_size" not in kwargs:
        kwargs["img_size"] = options.img_size
        torch.manual_seed(seed)
        built = create_model(model, **kwargs)
    facts = None
    if weights is not None:
        built, facts = weights.build(model, kwargs, seed)
    form = fit_input(source, built, options)
    warn_of_unused(given_options(options), Reading(source, options))
    return Job(wrap_for(built, form, exclude), source, form, options, tuple(exclude), facts)


def wrap_for(model: nn.Module, form: InputFormat, exclude: Sequence[str] = ()) -> MaskedGraph:
    """Wrap a model for images of this format, without masks for the layers that `exclude` matches.

    Raises:
        TraceError: as `growfx.wrap`; it says how a model states what images it takes.
    """
    generator = torch.Generator().manual_seed(0)
    with saying_how_inputs_are_stated():
        return wrap(model, torch.randn(1, *form.input_size, generator=generator, device="cpu"), exclude=exclude)


@contextmanager
def saying_how_inputs_are_stated() -> Generator[None]:
    """Put what a model's author can do in the place of `example_inputs`, which the command line does not have."""
    try:
        yield
    except RefusedInputsError as error:
        raise TraceError(
            f"{error.fact}. A model says what images it takes by an attribute, as timm's do: "
            "`pretrained_cfg = {'input_size': (1, 28, 28)}` is one channel of 28x28 pixels; for other inputs than "
            "images use growfx in Python"
        ) from error.__cause__


def reopen(path: Path, *, best: bool = False) -> tuple[MaskedGraph, RunFolder]:
    """The network of a run, with the weights and masks of its newest (or best) checkpoint.

    Raises:
        CheckpointError: no run, no checkpoint, damaged, or not of this model.
    """
    folder = RunFolder.open(path)
    config = folder.config
    state = read(folder.checkpoints.best) if best else folder.checkpoints.load()[0]
    try:
        model = create_model(config["model"]["name"], **config["model"]["kwargs"])
        net = wrap_for(model, InputFormat.from_json(config["input"]), config.get("exclude", ()))
        net.load_state_dict(state["net"])
    except KeyError as error:
        raise CheckpointError(f"`{path / 'config.json'}` has no {error}; it cannot be rebuilt") from error
    except (ConfigError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"the network of run `{path}` cannot be rebuilt ({reason})") from error
    return net.eval(), folder


def _takes(spec: str, argument: str) -> bool:
    """Whether the model's builder has this argument: timm's and torchvision's all do."""
    module, colon, attribute = spec.partition(":")
    if not colon:
        return True
    try:
        target: Any = importlib.import_module(module)
        for part in attribute.split("."):
            target = getattr(target, part)
        parameters = inspect.signature(target).parameters
    except (ImportError, AttributeError, TypeError, ValueError):
        return False  # create_model says what is wrong with it
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _fixed_size(model: nn.Module) -> bool:
    config = getattr(model, "pretrained_cfg", None)
    return isinstance(config, Mapping) and bool(config.get("fixed_input_size"))
