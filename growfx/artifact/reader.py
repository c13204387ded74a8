"""Load an artifact that may be damaged, hostile, or of another network.

`growfx.artifact.file` checks the file; this module builds the network. The decoded size is bounded and the
tensors are those of the model before anything is decoded. No code, no pickle: only timm's and torchvision's own
builders are called, by their registered names, with arguments that bring no weights and build no more than is
stored.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from growfx.artifact.dtypes import TORCH_DTYPES
from growfx.artifact.file import DEFAULT_MAX_BYTES, ArtifactFile, check_size, listed, opened
from growfx.artifact.folder import CONFIG
from growfx.artifact.info import ArtifactInfo, describe
from growfx.artifact.manifest import Manifest
from growfx.artifact.remembered_inputs import output_difference, remember_inputs
from growfx.artifact.rollback import unchanged_on_error
from growfx.compaction.apply import apply_plan, hollow
from growfx.compaction.plan import CompactionPlan
from growfx.errors import ArtifactError, ConfigError, one_line
from growfx.masked.doors import is_masked_graph
from growfx.masked.modules import cast_floating, in_format_of
from growfx.models.budget import build_budget
from growfx.models.build import WEIGHT_SOURCES, ModelIdentity, blueprint, build_unfilled
from growfx.notices import warn_once

__all__ = [
    "CONFIG",
    "DEFAULT_MAX_BYTES",
    "check_target",
    "inspect",
    "load",
    "load_masks",
    "load_state",
    "why_no_builder",
]

_SHOWN_COMPLAINTS = 4
_SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
# Above every class count and image size; a builder may fill a list of any length it is told.
_LARGEST_ARGUMENT = 1 << 24
# What timm's data pipeline reads from a model; the rest describes weights from elsewhere.
_PREPROCESSING = (
    "crop_mode",
    "crop_pct",
    "fixed_input_size",
    "input_size",
    "interpolation",
    "mean",
    "num_classes",
    "std",
    "test_crop_pct",
    "test_input_size",
)

# Times that a compacted network may have been larger.
_MOST_LEFT_OUT = 64


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> nn.Module:
    """Load the network of an artifact as a plain module in eval mode, its weights bit for bit as saved.

    `growfx.wrap` of it starts from inputs as the network had when it was saved.

    Args:
        path: the folder, its weights file alone, or `hf-hub:USER/NAME[@REVISION]`.
        model: an instance of the network's own class, to load into; needed where the artifact does not name a
            timm or torchvision model. Its tensors take the dtype of the stored ones. A `growfx.GrowfxWarning` tells
            where it gives other outputs than the network that was saved.
        dtype: cast to after exact decoding, as `model.to(dtype)` does: floating parameters and buffers only.
        device: of the network; default: where it is built, or where `model` is.
        max_bytes: refuse an artifact whose tensors would take more bytes than this. Decoding the largest tensor
            takes a multiple of its size on top.

    Raises:
        ArtifactError: not an artifact, damaged, newer, too large, or of another network; `model` is unchanged.
        ConfigError: `dtype` is not a floating one, or `device` is not there.
    """
    check_target(dtype, device)
    check_instance(model)
    with opened(path, max_bytes=max_bytes) as weights:
        manifest = weights.manifest
        check_size(manifest, max_bytes)
        identity = None if model is not None else _identity(manifest)
        small = manifest.compaction
        stored = sum(entry.numel for entry in manifest.tensors.values())
        # a network that was compacted is larger when it is built
        with _building(), build_budget(len(manifest.names), stored if small is None else _MOST_LEFT_OUT * stored):
            plan = model if identity is None else blueprint(identity)
        assert plan is not None
        _check_storage(plan, own=model is not None)
        _check_fit(plan if small is None else _smaller(plan, small, own=model is not None), manifest)
        state = _state(weights)
        if identity is not None:
            with _building():
                plan = build_unfilled(identity, plan)
            _restore_preprocessing(plan, manifest)
        with unchanged_on_error(plan):
            if small is not None:
                apply_plan(plan, small)
            places = _places(plan, state)
            plan.eval()  # before its weights are there: an `eval` of the model's own may write into them
            _fill(places)
            _set_other_state(plan, places, state)
            remember_inputs(plan, manifest.inputs)
            if identity is None:
                _compare_outputs(plan, manifest)
            plan = plan.to(device=device)
            return plan if dtype is None else cast_floating(plan, dtype)


def load_state(path: str | Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> dict[str, Tensor]:
    """Load the state dict of the plain network without building a model; tied names share one tensor.

    Raises:
        ArtifactError: not an artifact, damaged, newer, or too large.
    """
    with opened(path, max_bytes=max_bytes) as weights:
        check_size(weights.manifest, max_bytes)
        return _state(weights)


def inspect(path: str | Path) -> ArtifactInfo:
    """Read what an artifact holds from its header, without reading its weights.

    Raises:
        ArtifactError: not an artifact, or its header is damaged or newer than this reader.

    Example:
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), density=0.5)
        >>> _ = growfx.save(net, "out")
        >>> info = growfx.inspect("out")
        >>> info.nnz, info.numel, info.density
        (4, 8, 0.5)
    """
    with opened(path, max_bytes=None) as weights:
        return describe(weights.manifest, weights.size)


def load_masks(path: str | Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> dict[str, Tensor]:
    """Load the masks of an artifact: layer name -> bool tensor of the weight's shape, in data-flow order.

    Raises:
        ArtifactError: as `load`.
    """
    with opened(path, max_bytes=max_bytes) as weights:
        entries = {x.layer: (x.tensor, weights.manifest.tensors[x.tensor]) for x in weights.manifest.layers}
        total = sum(entry.numel for _, entry in entries.values())
        if total > max_bytes:
            raise ArtifactError(f"its masks take {total} bytes, more than max_bytes={max_bytes}")
        masks: dict[str, Tensor] = {}
        for layer, (name, entry) in entries.items():
            positions = weights.positions(name)
            mask = np.full(entry.numel, positions is None, dtype=np.bool_)
            if positions is not None:
                mask[positions] = True
            masks[layer] = torch.from_numpy(mask).reshape(entry.shape)
        return masks


def _state(weights: ArtifactFile) -> dict[str, Tensor]:
    """Decode all tensors; tied names share one."""
    state: dict[str, Tensor] = {}
    for name, entry in weights.manifest.tensors.items():
        bits = weights.bits(name)
        words, dtype = torch.from_numpy(bits.view(_SIGNED[bits.itemsize])), TORCH_DTYPES[entry.dtype]
        if dtype.is_complex:
            state[name] = torch.view_as_complex(words.view(dtype.to_real()).reshape(*entry.shape, 2))
        else:
            state[name] = words.view(dtype).reshape(entry.shape)
    return state | {alias: state[name] for alias, name in weights.manifest.aliases.items()}


def check_target(dtype: torch.dtype | None, device: torch.device | str | int | None) -> None:
    """Refuse a dtype or device that no network can have here.

    Raises:
        ConfigError: naming it.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"`dtype={dtype}` is not a floating dtype; expected e.g. torch.float32 or torch.bfloat16")
    try:
        place = None if device is None else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"`device={device}` cannot be used here ({reason}); `cpu` always can") from error
    if place is not None and place.type == "meta":
        raise ConfigError("`device=meta` holds no weights; load to `cpu`")
    if torch.get_default_device().type == "meta":
        raise ConfigError("the default device is `meta`, which holds no weights; load outside of `torch.device`")


def check_instance(model: object) -> None:
    """Refuse what cannot be loaded into.

    Raises:
        ArtifactError: it is a masked network, or not a module.
    """
    if model is None:
        return
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ArtifactError(f"`model=` expects an instance of the network's own class, a module, got `{kind}`")
    if is_masked_graph(model):
        raise ArtifactError(
            "`model=` expects a plain module, got a MaskedGraph; pass growfx.unwrap(net), or load masks with "
            "`net.set_masks(growfx.artifact.load_masks(path))`"
        )


def why_no_builder(recipe: Mapping[str, Any] | None, notes: Sequence[str]) -> str:
    """Why an artifact cannot be loaded without an instance of its model; "" where it can, as far as its recipe tells.

    Args:
        recipe, notes: `model` and `notes` of its `ArtifactInfo`.
    """
    if recipe is None:
        why = f" ({'; '.join(notes)})" if notes else ""
        return f"it does not say how its model is built{why}"
    library, name, kwargs = (recipe.get(key) for key in ("library", "name", "kwargs"))
    if library == "python":
        return f"its model is made by `{name}`; load runs no code named by a file"
    if library not in ("timm", "torchvision") or not isinstance(name, str) or not isinstance(kwargs, dict):
        return f"it names a model of `{library}`; allowed: timm, torchvision"
    return ""


def _identity(manifest: Manifest) -> ModelIdentity:
    recipe = manifest.model
    if why := why_no_builder(recipe, manifest.notes):
        raise ArtifactError(f"{why}; pass an instance as `model=`")
    assert recipe is not None
    library, name, kwargs = (recipe[key] for key in ("library", "name", "kwargs"))
    foreign = sorted(WEIGHT_SOURCES[library] & kwargs.keys())
    if foreign:
        raise ArtifactError(f"its model argument `{foreign[0]}` would fetch weights from elsewhere; refused")
    _check_arguments(kwargs)
    identity = ModelIdentity(library, name, kwargs)
    if ":" in identity.spec:
        raise ArtifactError(f"`{name}` is not a registered name of {library}")
    return identity


def _check_arguments(kwargs: Mapping[str, Any]) -> None:
    left: list[Any] = [kwargs]
    while left:
        value = left.pop()
        if isinstance(value, int | float) and abs(value) > _LARGEST_ARGUMENT:
            raise ArtifactError(f"it has a model argument of {value}; allowed are sizes up to {_LARGEST_ARGUMENT}")
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


@contextmanager
def _building() -> Generator[None]:
    try:
        yield
    except ConfigError as error:
        raise ArtifactError(f"its model cannot be built here: {error}") from error


def _check_storage(model: nn.Module, *, own: bool) -> None:
    """An instance that was passed has tensors to fill; a blueprint has none yet."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and nn.parameter.is_lazy(tensor):
            raise ArtifactError(f"`{name}` of the model has no shape yet; call the model once on an input first")
        if own and isinstance(tensor, Tensor) and tensor.is_meta:
            raise ArtifactError(f"`{name}` of `model=` has no storage; move the model with `to_empty` first")
        if own and isinstance(tensor, Tensor) and tensor.is_inference():
            raise ArtifactError(f"`{name}` of `model=` was made inside `torch.inference_mode`; build it outside")


def _check_fit(model: nn.Module, manifest: Manifest) -> None:
    """Keys and shapes of the model are exactly those stored; a float stays a float of some width."""
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    missing, extra = sorted(manifest.names - own.keys()), sorted(own.keys() - manifest.names)
    complaints: list[str] = []
    if missing:
        complaints.append(f"the model lacks {listed(missing)}")
    if extra:
        complaints.append(f"the artifact lacks {listed(extra)}")
    for name in sorted(own.keys() & manifest.names):
        entry, tensor = manifest.entry(name), own[name]
        if tuple(tensor.shape) != entry.shape:
            complaints.append(f"`{name}` is {tuple(tensor.shape)} in the model and {entry.shape} in the artifact")
        elif _kind(tensor.dtype) != _kind(TORCH_DTYPES[entry.dtype]):
            complaints.append(f"`{name}` is {tensor.dtype} in the model and {entry.dtype} in the artifact")
    if complaints:
        shown = "; ".join(complaints[:_SHOWN_COMPLAINTS])
        raise ArtifactError(f"the model is not the artifact's ({type(model).__name__}): {shown}")


def _smaller(model: nn.Module, plan: CompactionPlan, *, own: bool) -> nn.Module:
    """The model as small as the plan makes it, without values."""
    try:
        return apply_plan(hollow(model), plan)
    except ArtifactError as error:
        if not own:
            raise
        raise ArtifactError(f"the model is not the artifact's ({type(model).__name__}), or {error}") from error


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float"
    if dtype.is_complex:
        return "complex"
    return "bool" if dtype == torch.bool else "int"


def _places(model: nn.Module, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tensors of the model with those stored for them."""
    targets = model.state_dict(keep_vars=True)
    filled: dict[int, str] = {}
    placed: set[int] = set()
    plan: list[tuple[Tensor, Tensor]] = []
    for name, tensor in sorted(state.items()):
        target = targets[name]
        before = filled.setdefault(id(target), name)
        if state[before] is not tensor:
            raise ArtifactError(f"`{before}` and `{name}` are one tensor in the model and two in the artifact")
        if before == name:
            # Names that are tied in the artifact but not in this model get separate tensors.
            plan.append((target, tensor.clone() if id(tensor) in placed else tensor))
            placed.add(id(tensor))
    return plan


def _set_other_state(model: nn.Module, places: Iterable[tuple[Tensor, Tensor]], state: Mapping[str, Tensor]) -> None:
    """Let modules take entries of the state dict that are not parameters or buffers (`set_extra_state`, own hooks)."""
    held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    if all(id(target) in held for target, _ in places):
        return
    try:
        model.load_state_dict(dict(state), strict=False)
    except Exception as error:  # the model's own code
        raise ArtifactError(f"`{type(model).__name__}` does not take its state dict back: {one_line(error)}") from error


def _compare_outputs(model: nn.Module, manifest: Manifest) -> None:
    """Warn of an instance that has the tensors of the network, and computes something else with them."""
    if manifest.inputs is None or manifest.outputs is None:
        return
    different = output_difference(model, manifest.inputs, manifest.outputs)
    if different:
        shown = ", ".join(map(str, manifest.inputs))
        warn_once(
            f"`model=` is not the network that was saved: on the inputs noted with it ({shown}) it gives {different}; "
            "look for another setting, activation or version of its code, and for what is not in its state dict",
            [],
        )


def _fill(places: Iterable[tuple[Tensor, Tensor]]) -> None:
    # `.data` keeps every Parameter the object it is, so ties and references to it hold, and takes any dtype.
    for target, tensor in places:
        target.data = in_format_of(tensor.to(target.device), target)


def _restore_preprocessing(model: nn.Module, manifest: Manifest) -> None:
    saved, current = manifest.config.get("pretrained_cfg"), getattr(model, "pretrained_cfg", None)
    if isinstance(saved, dict) and isinstance(current, dict):
        kept = {k: saved[k] for k in _PREPROCESSING if k in saved}
        merged = {**current, **{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}}
        model.__dict__.update(pretrained_cfg=merged, default_cfg=merged)
