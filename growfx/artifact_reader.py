"""Reading an artifact that may be damaged, hostile, or of another network.

Nothing is believed before it is checked: the folder's config names plain files inside the folder and gives
the weights file's SHA-256; the manifest gives its own; names, dtypes and shapes of the file are those of the
manifest; the decoded size is bounded and the tensors are those of the model before anything is decoded; every
stream has its CRC-32. No code, no pickle: only timm's and torchvision's own builders are called, by their
registered names.
"""

import hashlib
import json
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from growfx.artifact_info import ArtifactInfo, describe
from growfx.codec import IndexStream, Positions, ValueStream, decode_index, decode_values
from growfx.errors import ArtifactError, ConfigError
from growfx.manifest import DTYPES, DenseEntry, Manifest, SparseEntry, check_version, from_metadata
from growfx.models import WEIGHT_SOURCES, ModelIdentity, blueprint, create_model

__all__ = ["CONFIG", "DEFAULT_MAX_BYTES", "inspect", "load", "load_masks", "load_state"]

CONFIG = "config.json"
DEFAULT_MAX_BYTES = 1 << 36

_SHOWN_NAMES = 4
_SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
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


def load(path: str | Path, *, model: nn.Module | None = None, max_bytes: int = DEFAULT_MAX_BYTES) -> nn.Module:
    """The network of an artifact as a plain module in eval mode, every bit of its weights as saved.

    Args:
        path: the folder, or its weights file alone.
        model: an instance of the network's own class, to load into; needed where the artifact does not name a
            timm or torchvision model. Its tensors take the dtype of the stored ones.
        max_bytes: refuse an artifact whose tensors would take more bytes than this.

    Raises:
        ArtifactError: no artifact, damaged, newer, too large, or of another network; `model` is unchanged.
    """
    with _opened(path, verify=True) as weights:
        manifest = weights.manifest
        _check_size(manifest, max_bytes)
        identity = None if model is not None else _identity(manifest)
        with _building():
            plan = model if identity is None else blueprint(identity)
        assert plan is not None
        _check_fit(plan, manifest)
        state = weights.tensors()
        if identity is not None:
            with _building(), torch.random.fork_rng(devices=[]):
                plan = create_model(identity.spec, **identity.kwargs)
            _restore_preprocessing(plan, manifest)
        _fill(plan, state)
        return plan.eval()


def load_state(path: str | Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> dict[str, Tensor]:
    """The state dict of the plain network, without building a model; tied names share one tensor.

    Raises:
        ArtifactError: no artifact, damaged, newer, or too large.
    """
    with _opened(path, verify=True) as weights:
        _check_size(weights.manifest, max_bytes)
        return weights.tensors()


def inspect(path: str | Path) -> ArtifactInfo:
    """What an artifact holds, from its header alone: no weight is read.

    Raises:
        ArtifactError: no artifact, or its header is damaged or newer than this reader.
    """
    with _opened(path, verify=False) as weights:
        return describe(weights.manifest, weights.file.stat().st_size)


def load_masks(path: str | Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> dict[str, Tensor]:
    """The masks of an artifact: layer name -> bool tensor of the weight's shape, in data-flow order.

    Raises:
        ArtifactError: as `load`.
    """
    with _opened(path, verify=True) as weights:
        entries = {x.layer: (x.tensor, weights.manifest.tensors[x.tensor]) for x in weights.manifest.layers}
        total = sum(entry.numel for _, entry in entries.values())
        if total > max_bytes:
            raise ArtifactError(f"its masks take {total} bytes, more than max_bytes={max_bytes}")
        masks: dict[str, Tensor] = {}
        for layer, (name, entry) in entries.items():
            if isinstance(entry, DenseEntry):
                masks[layer] = torch.ones(entry.shape, dtype=torch.bool)
            else:
                mask = np.zeros(entry.numel, dtype=np.bool_)
                mask[weights.positions(name, entry)] = True
                masks[layer] = torch.from_numpy(mask).reshape(entry.shape)
        return masks


class _Weights:
    """An open weights file whose header agrees with its manifest."""

    def __init__(self, file: Path, handle: Any) -> None:
        self.file, self._handle = file, handle
        metadata = handle.metadata() or {}
        if "growfx" not in metadata:
            raise ArtifactError("it is no growfx artifact: its metadata has no entry `growfx`")
        self.manifest = from_metadata(metadata["growfx"])
        self._check_header()

    def tensors(self) -> dict[str, Tensor]:
        """Decode all tensors; tied names share one."""
        state = {name: self.tensor(name) for name in self.manifest.tensors}
        return state | {alias: state[name] for alias, name in self.manifest.aliases.items()}

    def tensor(self, name: str) -> Tensor:
        """Decode one tensor."""
        entry = self.manifest.tensors[name]
        with _where(f"tensor `{name}`"):
            if isinstance(entry, DenseEntry):
                # A copy, for what safetensors gives may be a view of the file.
                tensor = self._handle.get_tensor(name).clone()
                _check_crc(tensor.reshape(-1).view(torch.uint8).numpy().data, entry.crc32)
                return tensor
            itemsize = DTYPES[entry.dtype].itemsize
            positions = self.positions(name, entry)
            data = self._bytes(f"{name}::values", entry.values_crc32)
            flat = np.zeros(entry.numel, dtype=f"u{itemsize}")
            flat[positions] = decode_values(ValueStream(entry.value_codec, entry.planes, data), entry.nnz, itemsize)
            return torch.from_numpy(flat.view(_SIGNED[itemsize])).view(DTYPES[entry.dtype]).reshape(entry.shape)

    def positions(self, name: str, entry: SparseEntry) -> Positions:
        """Positions of the active weights of one tensor, in C order."""
        with _where(f"mask of `{name}`"):
            data = self._bytes(f"{name}::index", entry.index_crc32)
            return decode_index(IndexStream(entry.index_codec, entry.index_raw, data), entry.nnz, entry.numel)

    def _bytes(self, name: str, crc32: int) -> memoryview:
        data = self._handle.get_tensor(name).reshape(-1).view(torch.uint8).numpy().data
        _check_crc(data, crc32)
        return data

    def _check_header(self) -> None:
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, entry in self.manifest.tensors.items():
            stored = entry.stored(name)
            if expected.keys() & stored.keys():
                raise ArtifactError(f"the artifact is damaged: `{name}` is stored under a name that is taken")
            expected |= stored
        found = set(self._handle.keys())
        if found != expected.keys():
            names = _listed(sorted(found ^ expected.keys()))
            raise ArtifactError(f"the artifact is damaged: file and manifest disagree about {names}")
        for name, (dtype, shape) in expected.items():
            part = self._handle.get_slice(name)
            if part.get_dtype() != dtype or tuple(part.get_shape()) != shape:
                raise ArtifactError(f"the artifact is damaged: `{name}` is not the {dtype} {shape} of its manifest")


@contextmanager
def _opened(path: str | Path, *, verify: bool) -> Generator[_Weights]:
    with _where(f"`{path}`"):
        place = Path(path)
        config = _read_config(place) if place.is_dir() else None
        file = place if config is None else _weights_file(place, config, verify)
        if not file.is_file():
            raise ArtifactError("there is no artifact at this path; give a folder or its weights file")
        try:
            with safe_open(str(file), framework="pt") as handle:
                weights = _Weights(file, handle)
                if config is not None:
                    _check_config(config, weights.manifest)
                yield weights
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"its weights file is damaged or cannot be read ({error})") from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"the folder has no `{CONFIG}`, so it holds no artifact") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"its `{CONFIG}` cannot be read ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("growfx"), dict):
        raise ArtifactError(f"its `{CONFIG}` has no `growfx` block, so the folder holds no artifact")
    return config


def _weights_file(folder: Path, config: Mapping[str, Any], verify: bool) -> Path:
    block = config["growfx"]
    check_version(block.get("format"), block.get("version"))
    name = block.get("weights")
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        raise ArtifactError(f"its `{CONFIG}` names the weights file `{name}`; only a plain file name is allowed")
    file = folder / name
    if not file.is_file():
        raise ArtifactError(f"its weights file `{name}` is missing")
    if file.resolve().parent != folder.resolve():
        raise ArtifactError(f"its weights file `{name}` is a link out of the folder; load that file by its own path")
    if block.get("bytes") != file.stat().st_size or (verify and block.get("sha256") != _sha256(file)):
        raise ArtifactError(f"the artifact is damaged: `{name}` is not the file that `{CONFIG}` describes")
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_config(config: Mapping[str, Any], manifest: Manifest) -> None:
    wrong = [f"`{key}`" for key, value in manifest.config.items() if config.get(key) != value]
    if config["growfx"].get("model") != manifest.model:
        wrong.append("`growfx.model`")
    if wrong:
        raise ArtifactError(f"its `{CONFIG}` was changed: {', '.join(wrong)} differ from the weights file's copy")


def _identity(manifest: Manifest) -> ModelIdentity:
    recipe = manifest.model
    if recipe is None:
        raise ArtifactError("it does not say how its model is built; pass an instance as `model=`")
    library, name, kwargs = (recipe.get(key) for key in ("library", "name", "kwargs"))
    if library == "python":
        raise ArtifactError(
            f"its model is made by `{name}`; load runs no code named by a file: pass an instance as `model=`"
        )
    if library not in ("timm", "torchvision") or not isinstance(name, str) or not isinstance(kwargs, dict):
        raise ArtifactError(f"it names a model of `{library}`; allowed: timm, torchvision; or pass `model=`")
    foreign = sorted(WEIGHT_SOURCES[library] & kwargs.keys())
    if foreign:
        raise ArtifactError(f"its model argument `{foreign[0]}` would fetch weights from elsewhere; refused")
    identity = ModelIdentity(library, name, kwargs)
    if ":" in identity.spec:
        raise ArtifactError(f"`{name}` is no registered name of {library}")
    return identity


@contextmanager
def _building() -> Generator[None]:
    try:
        yield
    except ConfigError as error:
        raise ArtifactError(f"its model cannot be built here: {error}") from error


def _check_size(manifest: Manifest, max_bytes: int) -> None:
    if manifest.decoded_bytes > max_bytes:
        raise ArtifactError(
            f"its tensors take {manifest.decoded_bytes} bytes, more than max_bytes={max_bytes}; "
            "raise max_bytes if the artifact is to be trusted"
        )


def _check_fit(model: nn.Module, manifest: Manifest) -> None:
    """Keys and shapes of the model are exactly those stored."""
    own = {name: tuple(t.shape) for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    missing, extra = sorted(manifest.names - own.keys()), sorted(own.keys() - manifest.names)
    complaints: list[str] = []
    if missing:
        complaints.append(f"the model lacks {_listed(missing)}")
    if extra:
        complaints.append(f"the artifact lacks {_listed(extra)}")
    for name in sorted(own.keys() & manifest.names):
        if own[name] != manifest.entry(name).shape:
            complaints.append(f"`{name}` is {own[name]} in the model and {manifest.entry(name).shape} in the artifact")
    if complaints:
        shown = "; ".join(complaints[:_SHOWN_NAMES])
        raise ArtifactError(f"the model is not the artifact's ({type(model).__name__}): {shown}")


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    targets = model.state_dict(keep_vars=True)
    filled: dict[int, str] = {}
    placed: set[int] = set()
    plan: list[tuple[Tensor, Tensor]] = []
    for name, tensor in sorted(state.items()):
        target = targets[name]
        if target.is_meta:
            raise ArtifactError(f"`{name}` of `model=` has no storage; move the model with `to_empty` first")
        before = filled.setdefault(id(target), name)
        if state[before] is not tensor:
            raise ArtifactError(f"`{before}` and `{name}` are one tensor in the model and two in the artifact")
        if before == name:
            # Names that are tied in the artifact but not in this model get tensors of their own.
            plan.append((target, tensor.clone() if id(tensor) in placed else tensor))
            placed.add(id(tensor))
    # `.data` keeps every Parameter the object it is, so ties and references to it hold, and takes any dtype.
    for target, tensor in plan:
        target.data = tensor.to(target.device)


def _restore_preprocessing(model: nn.Module, manifest: Manifest) -> None:
    saved, current = manifest.config.get("pretrained_cfg"), getattr(model, "pretrained_cfg", None)
    if isinstance(saved, dict) and isinstance(current, dict):
        kept = {k: saved[k] for k in _PREPROCESSING if k in saved}
        merged = {**current, **{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}}
        model.__dict__.update(pretrained_cfg=merged, default_cfg=merged)


@contextmanager
def _where(what: str) -> Generator[None]:
    try:
        yield
    except ArtifactError as error:
        # What is behind it stays; the same complaint without its place would only be noise.
        raise ArtifactError(f"{what}: {error}") from error.__cause__


def _check_crc(data: Any, crc32: int) -> None:
    if zlib.crc32(data) != crc32:
        raise ArtifactError("the artifact is damaged: its CRC-32 does not agree")


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN_NAMES])
    return shown + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")
