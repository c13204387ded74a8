"""Read an artifact into numpy and scipy arrays, without torch.

numpy has no bfloat16 and no 8-bit floats, and scipy's sparse arrays no float16: such values are widened to
float32, which is exact.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from growfx.artifact.file import DEFAULT_MAX_BYTES, ArtifactFile, check_size, opened
from growfx.artifact.manifest import ITEMSIZES
from growfx.errors import ArtifactError

if TYPE_CHECKING:
    import scipy.sparse as sp

__all__ = ["to_numpy", "to_scipy"]

_NATIVE = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "C128": np.complex128,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# An index and an offset of a sparse array, at their widest.
_INDEX_BYTES = 8


def to_numpy(path: str | Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> dict[str, NDArray[Any]]:
    """Read all tensors of an artifact as dense arrays by their names in the state dict; tied names share one array.

    Args:
        path: the folder, its weights file alone, or `hf-hub:USER/NAME[@REVISION]`.
        max_bytes: refuse an artifact whose tensors would take more bytes than this.

    Raises:
        ArtifactError: not an artifact, damaged, newer, or too large.

    Example:
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), density=0.5)
        >>> _ = growfx.save(net, "out")
        >>> {name: array.shape for name, array in growfx.to_numpy("out").items()}
        {'0.bias': (2,), '0.weight': (2, 4)}
    """
    with opened(path, max_bytes=max_bytes) as weights:
        manifest = weights.manifest
        check_size(manifest, max_bytes)
        arrays = {
            name: _numbers(weights.bits(name), entry.dtype).reshape(entry.shape)
            for name, entry in manifest.tensors.items()
        }
        return arrays | {alias: arrays[name] for alias, name in manifest.aliases.items()}


def to_scipy(path: str | Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> dict[str, sp.csr_array[Any, tuple[int, int]]]:
    """Read the masked layers of an artifact as sparse matrices: layer name -> `scipy.sparse.csr_array`.

    A matrix has the weight's first axis as rows and all other axes, in C order, as columns: output units by
    inputs (and kernel positions) for linear layers and convolutions; a transposed convolution's weight begins with
    its input channels. Every active weight is an explicit entry, also one that is zero; a full layer has all.

    Args:
        path: the folder, its weights file alone, or `hf-hub:USER/NAME[@REVISION]`.
        max_bytes: refuse an artifact whose matrices would take more bytes than this.

    Raises:
        ArtifactError: not an artifact, damaged, newer, or too large.

    Example:
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), density=0.5)
        >>> _ = growfx.save(net, "out")
        >>> matrix = growfx.to_scipy("out")["0"]
        >>> matrix.shape, matrix.nnz
        ((2, 4), 4)
    """
    with opened(path, max_bytes=max_bytes) as weights:
        entries = [weights.manifest.tensors[x.tensor] for x in weights.manifest.layers]
        stored = [(getattr(e, "nnz", e.numel), e) for e in entries]
        need = sum(
            n * (max(ITEMSIZES[e.dtype], 4) + _INDEX_BYTES) + (_rows(e.shape) + 1) * _INDEX_BYTES for n, e in stored
        )
        if need > max_bytes:
            raise ArtifactError(f"its matrices take up to {need} bytes, more than max_bytes={max_bytes}")
        return {x.layer: _matrix(weights, x.tensor) for x in weights.manifest.layers}


def _matrix(weights: ArtifactFile, name: str) -> sp.csr_array[Any, tuple[int, int]]:
    from scipy.sparse import csr_array

    entry = weights.manifest.tensors[name]
    rows, columns = _rows(entry.shape), prod(entry.shape[1:])
    values = _numbers(weights.values(name), entry.dtype)
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    positions = weights.positions(name)
    positions = np.arange(entry.numel) if positions is None else positions
    # Positions are ascending, so those of a row stand together and its columns are in order.
    row, column = np.divmod(positions, max(columns, 1))
    offsets = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row, minlength=rows), out=offsets[1:])
    narrow = np.int32 if max(columns, values.size) < 1 << 31 else np.int64
    return csr_array((values, column.astype(narrow), offsets.astype(narrow)), shape=(rows, columns))


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def _numbers(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values of bit patterns; those without a numpy type as float32."""
    if dtype in _NATIVE:
        return bits.view(_NATIVE[dtype])
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E5M2":  # the upper byte of a float16
        return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    return _E4M3[bits]


def _e4m3_values() -> NDArray[np.float32]:
    """All 256 values of the 8-bit float without infinities (arXiv:2209.05433, table 1)."""
    pattern = np.arange(256)
    exponent, mantissa = (pattern >> 3) & 15, pattern & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size[(pattern & 127) == 127] = np.nan
    return np.copysign(size, np.where(pattern < 128, 1.0, -1.0)).astype(np.float32)


_E4M3 = _e4m3_values()
