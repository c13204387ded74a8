"""Describe the contents of an artifact, layer by layer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from growfx.artifact.input_specs import InputSpec
from growfx.artifact.manifest import ITEMSIZES, DenseEntry, Manifest
from growfx.artifact.stored_cost import StoredCost

__all__ = ["ArtifactInfo", "LayerInfo", "describe"]


@dataclass(frozen=True)
class LayerInfo:
    """One masked layer: `bytes` are those of its stored weight; active zeros count as `nnz`.

    `dense_macs`, `sparse_macs`: multiply-accumulates of one sample's forward pass, with every weight and under the
    mask; None where the artifact does not tell.
    """

    name: str
    shape: tuple[int, ...]
    nnz: int
    numel: int
    density: float
    bytes: int
    codec: str
    dense_macs: float | None = None
    sparse_macs: float | None = None


@dataclass(frozen=True)
class ArtifactInfo:
    """An artifact's contents; prints as a table.

    Attributes:
        nnz, numel, density: over all masked layers.
        bytes: size of the weights file.
        dense_bytes: size of all tensors when none is sparse.
        layers: the masked layers in data-flow order.
        model: how the model is built (`library`, `name`, `kwargs`), or None.
        provenance: as given to `growfx.save`.
        version: of the format.
        inputs: what the network is called with; None where the artifact does not tell.
        identity_checked: whether what `model` builds gave the network's outputs when it was saved.
        notes: why there is no `model`, so that `growfx.load` needs an instance.
        cost: multiply-accumulates of one sample's forward pass; None where the artifact does not tell.
    """

    nnz: int
    numel: int
    density: float
    bytes: int
    dense_bytes: int
    layers: tuple[LayerInfo, ...]
    model: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    version: str
    inputs: tuple[InputSpec, ...] | None = None
    identity_checked: bool = False
    notes: tuple[str, ...] = ()
    cost: StoredCost | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {
            **asdict(self),
            "layers": [{**asdict(x), "shape": list(x.shape)} for x in self.layers],
            "inputs": None if self.inputs is None else [spec.to_json() for spec in self.inputs],
            "notes": list(self.notes),
            "cost": None if self.cost is None else self.cost.to_dict(),
        }

    def __str__(self) -> str:
        from tabulate import tabulate

        rows: list[list[Any]] = [
            [x.name, "x".join(map(str, x.shape)), x.nnz, x.numel, f"{x.density:.4f}", x.bytes, x.codec, *_counts(x)]
            for x in self.layers
        ]
        total = self.cost.totals() if self.cost else (None, None)
        whole = ["all masked layers", "", self.nnz, self.numel, f"{self.density:.4f}", "", ""]
        rows.append([*whole, _count(total[1]), _count(total[0])])
        headers = ["layer", "shape", "nnz", "numel", "density", "bytes", "codec", "multiply-adds", "when dense"]
        align = ("left", "left", "right", "right", "right", "right", "left", "right", "right")
        table = tabulate(rows, headers=headers, disable_numparse=True, colalign=align)
        return "\n".join([table, f"{self.bytes} bytes on disk, {self.dense_bytes} bytes when dense", *self.notes])


def _counts(layer: LayerInfo) -> list[str]:
    return [_count(layer.sparse_macs), _count(layer.dense_macs)]


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def describe(manifest: Manifest, size: int) -> ArtifactInfo:
    """The contents of a weights file of `size` bytes."""
    layers: list[LayerInfo] = []
    for layer, tensor in ((x.layer, x.tensor) for x in manifest.layers):
        entry = manifest.tensors[tensor]
        numel, itemsize = entry.numel, ITEMSIZES[entry.dtype]
        if isinstance(entry, DenseEntry):
            nnz, stored, codec = numel, numel * itemsize, "dense"
        else:
            nnz = entry.nnz
            stored = entry.index_bytes + (sum(entry.planes) if entry.planes else nnz * itemsize)
            codec = f"{entry.index_codec}+{entry.value_codec}"
        density = nnz / numel if numel else 1.0
        macs = manifest.cost.layers[layer] if manifest.cost else (None, None)
        layers.append(LayerInfo(layer, entry.shape, nnz, numel, density, stored, codec, *macs))
    nnz, numel = sum(x.nnz for x in layers), sum(x.numel for x in layers)
    return ArtifactInfo(
        nnz=nnz,
        numel=numel,
        density=nnz / numel if numel else 1.0,
        bytes=size,
        dense_bytes=manifest.decoded_bytes,
        layers=tuple(layers),
        model=manifest.model,
        provenance=manifest.provenance,
        version=manifest.version,
        inputs=manifest.inputs,
        identity_checked=manifest.identity_checked,
        notes=manifest.notes,
        cost=manifest.cost,
    )
