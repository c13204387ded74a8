"""What `growfx inspect` and `growfx eval` report of an artifact, a run or a model name."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growfx.analysis.network_cost import cost
from growfx.artifact.file import located
from growfx.artifact.hub import local_path
from growfx.artifact.info import ArtifactInfo
from growfx.artifact.remembered_inputs import as_example, default_inputs
from growfx.commands.job import reopen, wrap_for
from growfx.data.loaders import InputFormat, fit_input, make_loader
from growfx.data.sources import open_data
from growfx.data.unused import Reading, unused_in, warn_of_unused
from growfx.errors import ArtifactError, ConfigError, DataError, TraceError
from growfx.masked.graph import MaskedGraph
from growfx.models.build import create_model, default_image_shape
from growfx.notices import warn_once
from growfx.options import DataOptions, TrainOptions, as_json, parse_assignments
from growfx.passes.mask.swap import wrap
from growfx.training.evaluation import evaluate
from growfx.training.recipe import pick_device

__all__ = ["accuracy_of", "facts_of", "kind_of", "nothing_there", "place_of", "recorded_format", "require_builder"]

_WEIGHTS_FILE = "sparse.safetensors"
# What is recorded of a data set beside the options it was opened with.
_SOURCE = ("spec", "fingerprint")
# Options that say which images are in which split.
_SPLITTING = ("val_fraction", "split_seed")


def facts_of(path: str, model_kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Layer by layer: shape, nnz, numel, density, bytes (of an artifact) and the numbers of alive units.

    Args:
        path: an artifact (also `hf-hub:USER/NAME`), a run folder, or a model spec.
        model_kwargs: arguments of the model when `path` is its spec; refused elsewhere.

    Returns:
        `kind`, `model` (its name), `nnz`, `numel`, `density`, `layers`, and of an artifact `bytes` and `recipe`
        (library, name and arguments that build its model again, None where it has none). A layer has
        `alive_in` and `alive_out` as [alive, all]; `alive_note` says why when units could not be followed.

    Raises:
        ArtifactError, CheckpointError, ConfigError: damaged, or nothing of that name.
    """
    place = place_of(path)
    kind = kind_of(place)
    if kind != "other" and model_kwargs:
        raise ConfigError(f"`{path}` is stored with its model's arguments; arguments are for a model by name")
    if kind == "artifact":
        return _facts_of_artifact(place)
    if kind == "run":
        net, folder = reopen(place)
        return _facts_of_net("run", folder.config["model"]["name"], net)
    if place.exists():
        raise nothing_there(path)
    model = create_model(path, **(model_kwargs or {}))
    return _facts_of_net("model", path, wrap_for(model, _default_format(model)))


def accuracy_of(path: Path, data: str, split: str, assignments: Sequence[str] = ()) -> dict[str, Any]:
    """Accuracy of an artifact or a run on one split of a DATA spec.

    Images are prepared as in training where that is recorded; `assignments` (`key=value`) change data options
    and `device`.

    Raises:
        DataError: no such data or split, or other classes than the network has.
        ArtifactError, CheckpointError, ConfigError: damaged, or neither of the two.
    """
    from growfx.artifact import reader

    values = parse_assignments(assignments, {"data": DataOptions, "device": TrainOptions})
    if values["model"] or set(values["device"]) - {"device"}:
        raise ConfigError("`growfx eval` takes data options and `device` after `--set`, no training options")
    given, path = path, place_of(path)
    kind = kind_of(path)
    if kind == "artifact":
        info = reader.inspect(path)
        require_builder(info, path)
        net: nn.Module = reader.load(path)
        known: Mapping[str, Any] = info.provenance
    elif kind == "run":
        net, folder = reopen(path)
        known = folder.config
    else:
        raise nothing_there(path)
    recorded = dict(known.get("data", {}))
    classes = recorded.pop("classes", None)
    options = DataOptions(**{k: v for k, v in (recorded | values["data"]).items() if k not in _SOURCE})
    source = open_data(data, replace(options, cache_mb=0))  # each image is read once
    if classes is not None and list(source.classes) != classes:
        raise DataError(
            f"`{path}` was trained on {_listed(classes)}, `{data}` has {_listed(source.classes)}; "
            "the numbers of the classes would not mean the same"
        )
    usual = as_json(DataOptions()) | recorded
    changed = {name: value for name, value in values["data"].items() if value != usual[name]}
    reading = Reading(source, options, split)
    warn_of_unused(changed, reading)
    _warn_of_other_split(changed, reading, data, recorded)
    refit = "img_size" in values["data"] or "input" not in known
    form = fit_input(source, net, options) if refit else InputFormat.from_json(known["input"])
    device = pick_device(values["device"].get("device", "auto"))
    score = evaluate(net.to(device), make_loader(source, split, form, options), device)
    return {
        "path": str(given),
        "data": data,
        "split": split,
        "accuracy": score.accuracy,
        "standard_error": score.standard_error,
        "images": len(score.correct),
    }


def _warn_of_other_split(changed: Mapping[str, Any], reading: Reading, data: str, recorded: Mapping[str, Any]) -> None:
    """Tell of options by which images that the network was trained on come into the split it is measured on."""
    moved = [name for name in _SPLITTING if name in changed and name not in unused_in(changed, reading)]
    if not moved or reading.split == "train":
        return
    before = DataOptions(**{k: v for k, v in recorded.items() if k not in _SOURCE})
    before = replace(before, data_dir=reading.options.data_dir)
    if open_data(data, before).fingerprint == recorded.get("fingerprint"):  # the data of the training
        listed = " and ".join(f"`{name}` = {changed[name]!r} (then {getattr(before, name)!r})" for name in moved)
        warn_once(
            f"{listed} makes another split `{reading.split}` than the one of training, with images that the network "
            "may have been trained on; leave it out to measure on others",
            [],
        )


def _listed(classes: Sequence[str]) -> str:
    names = ", ".join(f"`{name}`" for name in classes[:3])
    return f"{len(classes)} classes ({names}{', ...' if len(classes) > 3 else ''})"


def place_of(path: str | Path) -> Path:
    """The path itself, or where an artifact of the Hub was fetched to; ArtifactError when it could not be."""
    with located(f"`{path}`"):
        return local_path(path)


def nothing_there(path: str | Path) -> ArtifactError:
    """The error to raise for a path of another kind."""
    return ArtifactError(f"`{path}` is neither an artifact (no `{_WEIGHTS_FILE}`) nor a run (no `config.json`)")


def require_builder(info: ArtifactInfo, path: Path) -> None:
    """Raise `ArtifactError` where a command cannot build the network of an artifact, and say what to give instead."""
    from growfx.artifact.reader import why_no_builder

    if why := why_no_builder(info.model, info.notes):
        run = next((folder for folder in path.absolute().parents[:2] if kind_of(folder) == "run"), None)
        instead = "the folder of the run that it was made of" if run is None else f"its run, `{run}`"
        # a run that was made from a spec can be built from it again, one of an instance cannot
        give = (
            f"give {instead}, or in Python "
            if info.model is not None and info.model["library"] == "python"
            else "in Python "
        )
        with located(f"`{path}`"):
            raise ArtifactError(f"{why}: {give}load it with `growfx.load(path, model=instance)`")


def kind_of(path: Path) -> str:
    """`artifact`, `run` or `other`."""
    if (path / _WEIGHTS_FILE).is_file() or (path.is_file() and path.suffix == ".safetensors"):
        return "artifact"
    return "run" if (path / "checkpoint").is_dir() or (path / "log.jsonl").is_file() else "other"


def _facts_of_artifact(path: Path) -> dict[str, Any]:
    from growfx.artifact import reader

    info = reader.inspect(path)
    name = info.model["name"] if info.model else "own model"
    facts = {**info.to_dict(), "kind": "artifact", "model": name, "recipe": info.model}
    reader.load_state(path)  # damage is an error; that the model cannot be built here is not
    try:
        require_builder(info, path)
        model = reader.load(path)
        known = default_inputs(model)
        net = (
            wrap_for(model, recorded_format(info.provenance, model))
            if known is None
            else wrap(model, as_example(known))
        )
    except (ConfigError, TraceError, DataError, ArtifactError) as error:
        return {**facts, "alive_note": f"alive units are not known: {error}"}
    # The plain model has no masks; a weight that is active and zero carries no path either.
    net.set_masks({name: layer.effective_weight.detach() != 0 for name, layer in net.layers.items()})
    return _with_alive(facts, net)


def _facts_of_net(kind: str, model: str, net: MaskedGraph) -> dict[str, Any]:
    counted = cost(net)
    layers = [
        {
            "name": name,
            "shape": list(layer.mask.shape),
            "nnz": layer.nnz,
            "numel": layer.numel,
            "density": layer.density,
            "dense_macs": counted.layers[name].dense,
            "sparse_macs": counted.layers[name].sparse,
        }
        for name, layer in net.layers.items()
    ]
    facts = {
        "kind": kind,
        "model": model,
        "nnz": net.nnz,
        "numel": net.numel,
        "density": net.density,
        "mask_digest": net.mask_digest(),
        "layers": layers,
        "cost": counted.to_json(),
    }
    return _with_alive(facts, net)


def _with_alive(facts: dict[str, Any], net: MaskedGraph) -> dict[str, Any]:
    from growfx.passes.path_products.products import path_products

    try:
        with torch.no_grad():
            # Connections count, not the scale of a norm: many models start with the last scale of a block at 0.
            paths = path_products(net.eval(), norm="identity")
    except TraceError as error:
        return {**facts, "alive_note": f"alive units are not known: {error}"}
    for layer in facts["layers"]:
        name = layer["name"]
        if name in paths.alive_in:
            for key, alive in (("alive_in", paths.alive_in[name]), ("alive_out", paths.alive_out[name])):
                layer[key] = [int(alive.sum()), alive.numel()]
    return facts


def recorded_format(provenance: Mapping[str, Any], model: nn.Module) -> InputFormat:
    """The input format an artifact was trained with, else the model's own; DataError when it is not readable."""
    recorded = provenance.get("input")
    return InputFormat.from_json(recorded) if recorded else _default_format(model)


def _default_format(model: nn.Module) -> InputFormat:
    channels, height, width = default_image_shape(model)
    return InputFormat((channels, height, width), (0.0,) * channels, (1.0,) * channels)
