"""Write the artifact: a pruned network on disk, near the entropy of its masks and weights.

A folder with `sparse.safetensors` (all tensors and a manifest, see `growfx.artifact.manifest`),
`config.json` (timm's keys and a `growfx` block) and a model card. The weights file alone is enough to load
the network. Masks are stored, never inferred from values: a freshly grown weight is active and zero.

`save` writes it, `load` rebuilds the plain network, `inspect` reads the header; `load_state` and `load_masks`
read the tensors and the masks without building a model.
"""

import copy
import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from growfx.analysis.network_cost import cost
from growfx.artifact.codec import encode_index, encode_values
from growfx.artifact.dtypes import DTYPE_NAMES
from growfx.artifact.info import ArtifactInfo, describe
from growfx.artifact.manifest import (
    FORMAT,
    ITEMSIZES,
    DenseEntry,
    LayerEntry,
    Manifest,
    SparseEntry,
    canonical,
    to_metadata,
)
from growfx.artifact.model_card import model_card
from growfx.artifact.model_recipe import FoundRecipe, find_recipe
from growfx.artifact.reader import CONFIG, DEFAULT_MAX_BYTES, inspect, load, load_masks, load_state
from growfx.artifact.remembered_inputs import specs_of
from growfx.artifact.staging import staged_folder
from growfx.artifact.stored_cost import StoredCost
from growfx.artifact.weights_file import MAX_HEADER
from growfx.compaction.plan import CompactionPlan
from growfx.distributed.sharded import HOW_TO_GATHER, require_whole
from growfx.errors import ArtifactError
from growfx.file_paths import as_path
from growfx.masked.doors import as_masked_graph, require_values
from growfx.masked.graph import MaskedGraph
from growfx.masked.layers import MaskedLayer
from growfx.masked.present.storage import on_whole_weights
from growfx.models.build import ModelIdentity
from growfx.notices import warn_once

__all__ = [
    "DEFAULT_MAX_BYTES",
    "artifact_target",
    "check_provenance",
    "inspect",
    "load",
    "load_masks",
    "load_state",
    "save",
]

_LOG = logging.getLogger("growfx")

WEIGHTS = "sparse.safetensors"
# timm and transformers load a file of this name without asking; it must hold every tensor, dense.
DENSE_WEIGHTS = "model.safetensors"
CARD = "README.md"

Buffer = bytes | memoryview

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# These describe the weights timm would fetch, not those stored here.
_WEIGHT_ORIGIN = (
    "custom_load",
    "file",
    "hf_hub_filename",
    "hf_hub_id",
    "license",
    "origin_url",
    "paper_ids",
    "paper_name",
    "source",
    "state_dict",
    "tag",
    "url",
)


@torch.inference_mode(False)  # copies made inside such a block could not be compared
@on_whole_weights
def save(
    net: MaskedGraph,
    path: str | Path,
    *,
    dense: bool = False,
    provenance: Mapping[str, Any] | None = None,
    origin: tuple[MaskedGraph, CompactionPlan] | None = None,
) -> ArtifactInfo:
    """Write `net` to the folder `path`, whole or not at all; the same net gives the same bytes.

    But for what it gives on example inputs, which is noted where it can be told: other hardware rounds it differently.

    The model that would be built by name is built, and compared with the network. Where it is another one, or gives
    other outputs, the artifact does not name it, a `growfx.GrowfxWarning` says why, and `load` needs an instance.

    Args:
        net: a masked network; weights outside its masks are stored as nothing and load as +0.0.
        path: a new folder, or one to whose other files nothing happens; an artifact in it is replaced.
        dense: also write `model.safetensors`, which timm and others can load, at full size.
        provenance: JSON values to keep beside the weights, for example how the network was trained.
        origin: where `net` is a compacted network: the one it was made of, and the plan that was followed
            (`growfx.save(net, path, compact=True)` does all of it).

    Returns:
        What was written, as `inspect` would tell; its `notes` say why the model is not named.

    Raises:
        ArtifactError: not a masked network, a tensor that cannot be stored or has no values (meta device), or a path
            that cannot be written.
        ConfigError: the weights are spread over processes (`fully_shard`).
    """
    net = require_values(as_masked_graph(net, "growfx.save"), "growfx.save")
    for parameter in net.parameters():
        require_whole(parameter, f"an artifact has whole ones; {HOW_TO_GATHER}")
    net, target = _evaluating(net), artifact_target(path, dense=dense)
    check_provenance(provenance)
    content, found = _encode(net, dict(provenance or {}), origin)
    try:
        info = _write(content, target, dense)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"the artifact cannot be written to `{target}` ({reason}); nothing was changed") from error
    if found.unexpected:
        # Each save gives a new object, on which its notes stand.
        why = "; ".join(found.notes)
        warn_once(f"`{target}` does not say how its model is built, for {why}; load it with `model=`, an instance", [])
    return info


def check_provenance(provenance: object) -> None:
    """Refuse what is not a mapping, with ArtifactError."""
    if provenance is not None and not isinstance(provenance, Mapping):
        raise ArtifactError(f"`provenance` expects a mapping of JSON values, got `{type(provenance).__name__}`")


def _evaluating(net: MaskedGraph) -> MaskedGraph:
    """The net, or a copy in eval mode where modules change weights when the mode changes (LoRA merges its own).

    What is loaded is in eval mode.
    """
    if not net.training or all(type(module).train is nn.Module.train for module in net.shell.modules()):
        return net
    return copy.deepcopy(net).eval()


def artifact_target(path: str | Path, *, dense: bool = False) -> Path:
    """The folder to write; ArtifactError where it cannot be one, or has files of others that would be replaced."""
    target = as_path(path, "growfx.save", ArtifactError)
    if target.is_file() or target.suffix == ".safetensors":
        raise ArtifactError(f"`{target}` is a file; save writes a folder: give the folder's path")
    for name in _foreign(target, dense):
        raise ArtifactError(
            f"`{name}` in `{target}` was not written by `growfx.save`, which would replace it; nothing was changed: "
            "choose another folder, or move that file away"
        )
    return target


def _foreign(target: Path, dense: bool) -> list[str]:
    """The files in `target` that a save would replace and that no save wrote."""
    weights = (target / WEIGHTS).exists()  # nobody else has files of that name
    try:
        config = json.loads((target / CONFIG).read_text(encoding="utf-8"))
        is_ours = isinstance(config, dict) and isinstance(config.get("growfx"), dict)
    except (OSError, ValueError):  # none, or a damaged one: told by what lies beside it
        is_ours = weights
    names = [] if is_ours else [CONFIG, CARD]
    names += [DENSE_WEIGHTS] if dense and not _has_dense(target) else []
    return [name for name in names if os.path.lexists(target / name)]


@dataclass(frozen=True)
class _Content:
    """Everything to be written: the manifest, the streams of the weights file, and the dense tensors."""

    manifest: Manifest
    streams: Mapping[str, Buffer]
    dense: Mapping[str, Tensor]


def _encode(
    net: MaskedGraph, provenance: Mapping[str, Any], origin: tuple[MaskedGraph, CompactionPlan] | None
) -> tuple[_Content, FoundRecipe]:
    state, layers = _plain_state(net)
    entries: dict[str, DenseEntry | SparseEntry] = {}
    aliases: dict[str, str] = {}
    streams: dict[str, Buffer] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        # Tied tensors: the same memory under another name.
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        layer = layers.get(name)
        if tensor.numel() and place in first:
            if layers.get(first[place]) is not layer:
                raise ArtifactError(
                    f"`{first[place]}` and `{name}` have come into the same memory since the model was wrapped, under "
                    "two masks; tie them by one parameter before, or give each its own memory (`.clone()`)"
                )
            aliases[name] = first[place]
            continue
        first[place] = name
        if layer is None or bool(layer.mask.all()):
            entry, parts = _encode_dense(name, tensor)
        else:
            entry, parts = _encode_sparse(name, layer.mask, tensor)
        entries[name] = entry
        if streams.keys() & parts.keys() or "__metadata__" in parts:
            raise ArtifactError(f"`{name}` would be stored under a name that is taken; rename the parameter")
        streams.update(parts)
    names = {id(layer): name for name, layer in net.layers.items()}
    listed = {id(layer): tensor for tensor, layer in layers.items() if tensor in entries}
    for key, name in names.items():
        if key not in listed:
            raise ArtifactError(
                f"the model's state dict leaves out the weight of `{name}`, which is masked; leave it out of the "
                "masks (`growfx.wrap(..., exclude=...)`) if it is not to be stored"
            )
    order = tuple(LayerEntry(names[key], listed[key]) for key in names)
    described, plan = origin or (net, None)
    found = find_recipe(described)
    manifest = Manifest(
        tensors=entries,
        aliases=aliases,
        layers=order,
        config=_config(described, found.recipe),
        model=found.recipe,
        provenance=provenance,
        compaction=plan or None,
        inputs=specs_of(net.example()),
        identity_checked=found.checked,
        notes=found.notes,
        cost=_stored_cost(net),
        outputs=found.outputs,
    )
    return _Content(manifest, streams, state), found


def _stored_cost(net: MaskedGraph) -> StoredCost | None:
    """The cost of a forward pass; None where the network cannot be run here, which does not prevent storing it."""
    try:
        found = cost(net)
    except Exception as error:  # the model's own code: it may raise anything
        _LOG.info("the artifact does not tell multiply-accumulates, for a forward pass fails: %s", error)
        return None
    return StoredCost({name: (layer.dense, layer.sparse) for name, layer in found.layers.items()}, found.rest)


def _plain_state(net: MaskedGraph) -> tuple[dict[str, Tensor], dict[str, MaskedLayer]]:
    """The state dict of the plain model, and which of its names are masked by which layer."""
    state = net.state_dict(keep_vars=True)
    masks = {id(layer.mask) for layer in net.layers.values()}
    owner = {id(layer.parameter): layer for layer in net.layers.values()}
    plain: dict[str, Tensor] = {}
    layers: dict[str, MaskedLayer] = {}
    for name, tensor in state.items():
        if id(tensor) in masks:
            continue
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.dtype not in DTYPE_NAMES:
            kind = f"{tensor.dtype} {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArtifactError(f"`{name}` ({kind}) cannot be stored; allowed: dense tensors of {', '.join(ITEMSIZES)}")
        if id(tensor) in owner:
            layers[name] = owner[id(tensor)]
        plain[name] = tensor.detach()
    return plain, layers


def _encode_dense(name: str, tensor: Tensor) -> tuple[DenseEntry, dict[str, Buffer]]:
    data = _bytes(tensor)
    return DenseEntry(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), zlib.crc32(data)), {name: data}


def _encode_sparse(name: str, mask: Tensor, tensor: Tensor) -> tuple[SparseEntry, dict[str, Buffer]]:
    if tensor.is_complex():
        raise ArtifactError(
            f"`{name}` ({tensor.dtype}) is masked; complex weights are stored whole only: leave its layer out of the "
            "masks (`growfx.wrap(..., exclude=...)`)"
        )
    positions = np.flatnonzero(mask.detach().cpu().contiguous().reshape(-1).numpy())
    itemsize = tensor.dtype.itemsize
    flat = tensor.cpu().contiguous().reshape(-1).view(_WORDS[itemsize]).numpy().view(f"u{itemsize}")
    index = encode_index(positions, flat.size)
    values = encode_values(flat[positions], floating=tensor.is_floating_point())
    entry = SparseEntry(
        dtype=DTYPE_NAMES[tensor.dtype],
        shape=tuple(tensor.shape),
        nnz=positions.size,
        index_codec=index.codec,
        index_raw=index.raw_size,
        index_bytes=len(index.data),
        index_crc32=zlib.crc32(index.data),
        value_codec=values.codec,
        planes=values.planes,
        values_crc32=zlib.crc32(values.data),
    )
    return entry, {f"{name}::index": index.data, f"{name}::values": values.data}


def _bytes(tensor: Tensor) -> Buffer:
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _config(net: MaskedGraph, model: Mapping[str, Any] | None) -> dict[str, Any]:
    """timm's keys. They describe the network for other programs; `load` builds it from the `growfx` block."""
    kwargs = dict(model["kwargs"]) if model else {}
    architecture = None
    if model:
        # timm keeps the tag of the pretrained weights apart.
        architecture = model["name"].split(".")[0] if model["library"] == "timm" else _spec(model)
    source = getattr(net.shell, "pretrained_cfg", None)
    source = source if isinstance(source, Mapping) else {}
    pretrained = {k: v for k, v in source.items() if v is not None and k not in _WEIGHT_ORIGIN}
    classes = getattr(net.shell, "num_classes", kwargs.get("num_classes"))
    config = {
        "architecture": architecture,
        "model_args": kwargs,
        "num_classes": classes if isinstance(classes, int) else None,
        "pretrained_cfg": pretrained,
    }
    features = getattr(net.shell, "num_features", None)
    if isinstance(features, int):  # timm writes it for the reader's information
        config["num_features"] = features
    # Through JSON and back, for tuples become lists and the two copies of it must be equal.
    return json.loads(canonical(config))


def _spec(model: Mapping[str, Any]) -> str:
    return ModelIdentity(model["library"], model["name"]).spec


def _write(content: _Content, target: Path, dense: bool) -> ArtifactInfo:
    manifest = content.manifest
    stored = {k: v for name, entry in manifest.tensors.items() for k, v in entry.stored(name).items()}
    stale = [] if dense else [DENSE_WEIGHTS] if _has_dense(target) else []
    with staged_folder(target, first=WEIGHTS, last=CONFIG, stale=stale) as folder:
        size, digest = _write_safetensors(folder / WEIGHTS, {"growfx": to_metadata(manifest)}, stored, content.streams)
        info = describe(manifest, size)
        if dense:
            _require_real(content.dense)
            shapes = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in content.dense.items()}
            tensors = {name: _bytes(t) for name, t in content.dense.items()}
            _write_safetensors(folder / DENSE_WEIGHTS, {"format": "pt"}, shapes, tensors)
        block = {
            "bytes": size,
            "dense_weights": DENSE_WEIGHTS if dense else None,
            "density": info.density,
            "format": FORMAT,
            "model": manifest.model,
            "nnz": info.nnz,
            "numel": info.numel,
            "provenance": manifest.provenance,
            "sha256": digest,
            "version": manifest.version,
            "weights": WEIGHTS,
        }
        config = json.dumps({**manifest.config, "growfx": block}, indent=2, sort_keys=True)
        (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
        (folder / CARD).write_text(model_card(info, manifest.config), encoding="utf-8")
    return info


def _require_real(tensors: Mapping[str, Tensor]) -> None:
    name = next((name for name, tensor in tensors.items() if tensor.is_complex()), None)
    if name is not None:
        raise ArtifactError(
            f"`{name}` ({tensors[name].dtype}) has no dense safetensors file that others read; leave `dense` out"
        )


def _has_dense(target: Path) -> bool:
    """Whether `target` holds dense weights that an earlier `save` wrote."""
    try:
        config = json.loads((target / CONFIG).read_text(encoding="utf-8"))
        return config["growfx"]["dense_weights"] == DENSE_WEIGHTS
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_safetensors(
    file: Path,
    metadata: Mapping[str, str],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    data: Mapping[str, Buffer],
) -> tuple[int, str]:
    """Write a safetensors file stream by stream; returns its size and SHA-256.

    The layout is the safetensors library's: widest dtypes first, then by name, header padded to 8 bytes.
    """
    order = sorted(tensors, key=lambda name: (-ITEMSIZES[tensors[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + memoryview(data[name]).nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ArtifactError(f"its header takes {len(text)} bytes; allowed are {MAX_HEADER}: shorten `provenance`")
    digest, size = hashlib.sha256(), 0
    with file.open("wb") as out:
        for part in (struct.pack("<Q", len(text)), text, *(data[name] for name in order)):
            out.write(part)
            digest.update(part)
            size += memoryview(part).nbytes
    return size, digest.hexdigest()
