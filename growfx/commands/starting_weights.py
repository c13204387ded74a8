"""Start a run from weights: a state dict in a file, or the pretrained weights of the model's library.

timm's models read through timm's own filters, which rename tensors of older releases and resize tables of positions.
A head of another number of classes keeps its initial weights, and is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growfx.distributed import ranks
from growfx.errors import CheckpointError, ConfigError
from growfx.models.build import create_model
from growfx.notices import warn_once
from growfx.runs.checkpoint import content_digest

__all__ = ["StartingWeights", "file_digest", "split_arguments"]

# Within what training scripts save; averaged weights first, as timm does.
_INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model")
_WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and DistributedDataParallel
_OPTIONAL = "num_batches_tracked"  # state dicts from before it are still about
_EXPORT = "`growfx export RUN --out DIR --dense` writes a state dict to `DIR/model.safetensors`"
_ASKED = ("pretrained", "checkpoint_path")


@dataclass(frozen=True)
class StartingWeights:
    """Where the initial weights of a run come from.

    Attributes:
        file: a state dict (`.pth`, `.pt`, `.bin`, `.safetensors`); None: the library's pretrained weights.
    """

    file: Path | None = None

    def build(self, spec: str, kwargs: Mapping[str, Any], seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """Build the model with these weights, and say which they are.

        Args:
            spec, kwargs: as `growfx.create_model` takes them, `num_classes` among them where it counts.
            seed: of the weights that the source has not.

        Returns:
            the model and, as JSON values: `kind` ("checkpoint" or "pretrained"), `name`, `sha256`, `of` ("file", or
            "tensors": of their names, types and bits) and `left_out`, the tensors that kept their initial values.

        Raises:
            CheckpointError: the file is missing, damaged, or of another architecture.
            ConfigError: the model cannot be built, or there are no pretrained weights for it.
        """
        if self.file is not None:
            digest = file_digest(self.file)
            state = _state_of(_stored(self.file), self.file)
            model, left_out = _fitted(spec, kwargs, seed, state, f"checkpoint `{self.file}`")
            facts = {"kind": "checkpoint", "name": self.file.name, "sha256": digest, "of": "file"}
        elif spec.startswith("torchvision/"):
            name, state = _torchvision_weights(spec, kwargs)
            model, left_out = _fitted(spec, kwargs, seed, state, f"`{name}`")
            facts = {"kind": "pretrained", "name": name, "sha256": content_digest(state), "of": "tensors"}
        else:
            model, name, left_out = _timm_pretrained(spec, kwargs, seed)
            kept = {key: tensor for key, tensor in model.state_dict().items() if key not in left_out}
            facts = {"kind": "pretrained", "name": name, "sha256": content_digest(kept), "of": "tensors"}
        if left_out:
            names = ", ".join(f"`{key}`" for key in left_out)
            warn_once(f"{names} have another number of classes in {facts['name']} and start from initial values", [])
        return model, {**facts, "left_out": left_out}


def split_arguments(
    spec: str, kwargs: Mapping[str, Any], *, pretrained: bool = False, checkpoint: Path | None = None
) -> tuple[StartingWeights | None, dict[str, Any]]:
    """Separate where weights come from (the flags, or timm's arguments for it) from what shapes a model.

    Raises:
        ConfigError: two sources of weights, or one asked for and refused at once.
    """
    rest = dict(kwargs)
    files, asked = [checkpoint] if checkpoint is not None else [], pretrained
    if ":" not in spec and not spec.startswith("torchvision/"):
        given = rest.pop(_ASKED[0], None)
        if pretrained and given is not None and not given:
            raise ConfigError(f"`--pretrained` and `--set model.pretrained={given}` contradict each other; give one")
        asked = bool(given) or pretrained
        path = rest.pop(_ASKED[1], None)
        files += [Path(path)] if path else []
    if len(set(files)) + asked > 1:
        raise ConfigError(
            "initial weights come from one source: give `--pretrained` or one `--checkpoint FILE`, and neither "
            "`model.pretrained` nor `model.checkpoint_path` beside them"
        )
    return (StartingWeights(files[0] if files else None) if files or asked else None), rest


# -- files --------------------------------------------------------------------------------------------------------


def file_digest(file: Path) -> str:
    """Return the sha256 (hex) of a file of weights; `CheckpointError` when it is not there or not a file."""
    if file.is_dir():
        raise CheckpointError(
            f"checkpoint `{file}` is a folder; expected a state dict in one file. Of a run, {_EXPORT}"
        )
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint `{file}` was not found; expected a state dict (.pth, .pt, .bin or .safetensors)"
        ) from error
    except OSError as error:
        raise CheckpointError(f"checkpoint `{file}` cannot be read ({error.strerror})") from error


def _stored(file: Path) -> Any:
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files end in whatever the readers meet first
        said = " ".join(str(error).split()).partition(". ")[0][:160]
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise CheckpointError(
            f"checkpoint `{file}` cannot be read ({reason}); expected a state dict as "
            "`torch.save(model.state_dict(), FILE)` or safetensors writes it"
        ) from error


def _state_of(stored: Any, file: Path) -> dict[str, Tensor]:
    """The tensors by name, out of what training scripts wrap around them."""
    parts = [stored.get(key) for key in _INSIDE] if isinstance(stored, Mapping) else []
    inner = next((part for part in parts if isinstance(part, Mapping) and part), stored)
    named = inner.items() if isinstance(inner, Mapping) else ()
    tensors = {k: v for k, v in named if isinstance(k, str) and isinstance(v, Tensor)}
    if any(name.endswith("::index") for name in tensors):
        raise CheckpointError(f"checkpoint `{file}` is a sparse artifact of growfx; {_EXPORT}")
    if not tensors:
        raise CheckpointError(f"checkpoint `{file}` holds no state dict: no tensors by name")
    state = {}
    for name, tensor in tensors.items():
        plain = name
        for prefix in (*_WRAPPERS, _WRAPPERS[0]):
            plain = plain.removeprefix(prefix)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"checkpoint `{file}` is damaged: `{name}` holds values that are not finite")
        state[plain] = tensor
    return state


# -- fitting them to a model --------------------------------------------------------------------------------------


def _fitted(
    spec: str, kwargs: Mapping[str, Any], seed: int, state: Mapping[str, Tensor], what: str
) -> tuple[nn.Module, list[str]]:
    """Build the model and load `state`; returns it and the tensors of its head that have other sizes there."""
    torch.manual_seed(seed)
    model = create_model(spec, **kwargs)
    own = model.state_dict()
    heads = _heads(state, own, _classes(model, kwargs))
    state = {**{k: v for k, v in own.items() if k.endswith(_OPTIONAL)}, **state, **{k: own[k] for k in heads}}
    difference = _difference(state, own)
    if difference is None:
        model.load_state_dict(state)
        return model, heads
    filtered = _by_timm(spec, kwargs, seed, model, state)
    if filtered is None:
        raise CheckpointError(f"{what} is not of `{spec}`: {difference}")
    return filtered, heads


def _classes(model: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    return kwargs.get("num_classes", getattr(model, "num_classes", None))


def _heads(state: Mapping[str, Tensor], own: Mapping[str, Tensor], classes: Any) -> list[str]:
    """Tensors that differ only in their first size, which is the model's number of classes."""
    return [
        key
        for key, tensor in own.items()
        if key in state
        and tensor.ndim
        and tensor.shape[0] == classes
        and state[key].ndim == tensor.ndim
        and state[key].shape[0] != classes
        and state[key].shape[1:] == tensor.shape[1:]
    ]


def _difference(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """How a state dict differs from a model's in names and shapes; None where it does not."""
    other = [
        f"`{k}` {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    groups = {
        "missing": [f"`{k}`" for k in own if k not in state],
        "unknown": [f"`{k}`" for k in state if k not in own],
        "of other shape": other,
    }
    parts = [f"{len(found)} tensors {kind} ({', '.join(found[:2])})" for kind, found in groups.items() if found]
    return ", ".join(parts) or None


def _by_timm(
    spec: str, kwargs: Mapping[str, Any], seed: int, plain: nn.Module, state: Mapping[str, Tensor]
) -> nn.Module | None:
    """The model, with a state dict loaded through timm's filter for it; None where that does not fit either.

    timm's loader is told of as many classes as the model has: for another number it would drop the head and load
    whatever names happen to agree.
    """
    config = getattr(plain, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or ":" in spec:
        return None
    first = config.get("first_conv")
    stems = [state.get(f"{name}.weight") for name in ([first] if isinstance(first, str) else first or ())]
    if any(stem is not None and stem.ndim == 4 and stem.shape[1] not in (3, plain.in_chans) for stem in stems):
        return None  # timm turns three channels into others, and leaves out what it cannot turn
    overlay = {"state_dict": dict(state), "num_classes": _classes(plain, kwargs), "label_offset": 0}
    torch.manual_seed(seed)
    try:
        loaded = create_model(spec, **{**kwargs, "pretrained": True, "pretrained_cfg_overlay": overlay})
    except ConfigError:
        return None
    plain.load_state_dict(loaded.state_dict())  # `loaded` keeps the overlay, tensors and all
    return plain


# -- pretrained weights -------------------------------------------------------------------------------------------


def _timm_pretrained(spec: str, kwargs: Mapping[str, Any], seed: int) -> tuple[nn.Module, str, list[str]]:
    if ":" in spec:
        raise ConfigError(f"`{spec}` has no pretrained weights that growfx knows of; give a file with `--checkpoint`")

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return create_model(spec, **{**kwargs, "pretrained": True})

    model = _downloaded(build, spec)
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name = ".".join(part for part in (config.get("architecture", spec), config.get("tag")) if part)
    heads = config.get("classifier") or ()
    left_out = [
        key
        for head in ([heads] if isinstance(heads, str) else heads)
        for key in (f"{head}.weight", f"{head}.bias")
        if key in model.state_dict() and config.get("num_classes") != _classes(model, kwargs)
    ]
    return model, name, left_out


def _torchvision_weights(spec: str, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Name and tensors of the weights that torchvision recommends for a model."""
    from torchvision.models import get_model_builder, get_model_weights

    plain = create_model(spec, **kwargs)  # unknown names end here
    name = spec.partition("/")[2]
    best: Any = getattr(get_model_weights(name), "DEFAULT", None)
    if best is None:
        raise ConfigError(f"torchvision has no pretrained weights for `{spec}`; give a file with `--checkpoint`")
    pretrained = _downloaded(lambda: get_model_builder(name)(weights=best, progress=False), spec)
    for key, value in vars(pretrained).items():
        setting = isinstance(value, bool | int | float | str) and not key.startswith("_")
        if setting and key not in ("training", "num_classes") and vars(plain).get(key) != value:
            raise ConfigError(
                f"the pretrained weights of `{spec}` are for `{key}` = {value!r}; add `--set model.{key}={value}`"
            )
    return f"{type(best).__name__}.{best.name}", pretrained.state_dict()


def _downloaded(build: Callable[[], nn.Module], spec: str) -> nn.Module:
    """Build on the first rank, whose download the others find in the cache, then on all."""

    def attempt() -> nn.Module:
        try:
            return build()
        except Exception as error:  # whatever a download may end in
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(
                f"the pretrained weights of `{spec}` cannot be had ({reason}); without a network, fetch them "
                "elsewhere and give the file with `--checkpoint FILE`"
            ) from error

    kept = ranks.on_first(attempt)
    return attempt() if kept is None else kept
