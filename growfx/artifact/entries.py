"""Manifest entries of one tensor: dtype, shape and streams, dense or sparse."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

__all__ = ["COMPLEX_PARTS", "ITEMSIZES", "DenseEntry", "SparseEntry"]

# safetensors' names, and bytes of one element.
ITEMSIZES: Final[Mapping[str, int]] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "C128": 16,
    "C64": 8,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
# Complex numbers stand in the file as pairs of floats, which every reader of safetensors knows.
COMPLEX_PARTS: Final[Mapping[str, str]] = {"C64": "F32", "C128": "F64"}


@dataclass(frozen=True)
class DenseEntry:
    """A tensor under its own name, all elements stored."""

    dtype: str
    shape: tuple[int, ...]
    crc32: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def stored(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names in the weights file -> dtype and shape there."""
        if self.dtype in COMPLEX_PARTS:
            return {name: (COMPLEX_PARTS[self.dtype], (*self.shape, 2))}
        return {name: (self.dtype, self.shape)}

    def to_json(self) -> dict[str, Any]:
        """As in the manifest."""
        return {"crc32": self.crc32, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class SparseEntry:
    """A tensor of which `nnz` elements are active: `NAME::index` and `NAME::values`."""

    dtype: str
    shape: tuple[int, ...]
    nnz: int
    index_codec: str
    index_raw: int
    index_bytes: int
    index_crc32: int
    value_codec: str
    planes: tuple[int, ...]
    values_crc32: int

    @property
    def numel(self) -> int:
        """Number of elements, active or not."""
        return prod(self.shape)

    def stored(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names in the weights file -> dtype and shape there."""
        raw = self.value_codec == "raw"
        values = (self.dtype, (self.nnz,)) if raw else ("U8", (sum(self.planes),))
        return {f"{name}::index": ("U8", (self.index_bytes,)), f"{name}::values": values}

    def to_json(self) -> dict[str, Any]:
        """As in the manifest."""
        values: dict[str, Any] = {"codec": self.value_codec, "crc32": self.values_crc32}
        if self.value_codec == "planes":
            values["planes"] = list(self.planes)
        return {
            "dtype": self.dtype,
            "index": {
                "bytes": self.index_bytes,
                "codec": self.index_codec,
                "crc32": self.index_crc32,
                "raw": self.index_raw,
            },
            "nnz": self.nnz,
            "shape": list(self.shape),
            "values": values,
        }
