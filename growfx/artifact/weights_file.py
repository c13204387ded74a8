"""Read a safetensors file through one open handle, without trusting its header.

The format (github.com/huggingface/safetensors, README): eight bytes with the length of the header, the header
as JSON (`__metadata__`, then name -> dtype, shape, data_offsets), then the tensors back to back without holes.
This reader also refuses what the format leaves open: names given twice, tensors that overlap, a length of data
that does not follow from dtype and shape, bytes behind the last tensor. It reads instead of mapping the file
into memory, so that a file cut short by another program is an error and not the end of the process.
"""

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from growfx.artifact.entries import COMPLEX_PARTS, ITEMSIZES
from growfx.errors import ArtifactError

__all__ = ["MAX_HEADER", "SNIFFED", "StoredTensor", "WeightsFile", "open_regular", "parse_json", "wrong_file"]

# The largest zoo model needs under 1 MB; parsed JSON takes some twenty times its text.
MAX_HEADER = 1 << 25

# Dtypes of tensors in the file; complex ones stand there as pairs.
_STORED = tuple(dtype for dtype in ITEMSIZES if dtype not in COMPLEX_PARTS)
_FIELDS = {"data_offsets", "dtype", "shape"}
# First bytes that `wrong_file` wants.
SNIFFED = 256
_LFS = b"version https://git-lfs"
_FOREIGN = [
    (_LFS, "it is a Git LFS pointer, not the file it stands for; fetch that with `git lfs pull`"),
    (b"<", "it is a web page or XML, not the file itself; on a model hub download from the `resolve` address"),
    (b"PK\x03\x04", "it is a zip archive, as torch.save and numpy write; growfx reads no pickle: use growfx.save"),
    (b"\x80", "it is a pickle; growfx reads none, for loading one runs its code: use growfx.save"),
    (b"\x89HDF", "it is an HDF5 file, not an artifact"),
    (b"\x93NUMPY", "it is a numpy file, not an artifact"),
    (b"GGUF", "it is a GGUF file, not an artifact"),
    (b"\x1f\x8b", "it is a gzip archive; unpack it first"),
]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: dtype by safetensors' name, shape, first byte and number of bytes in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class WeightsFile:
    """A regular file with a sound safetensors header that carries a `growfx` entry.

    Attributes:
        size: bytes of the file when it was opened.
        metadata: text of the `growfx` entry.
        tensors: name -> what is stored.

    Raises:
        ArtifactError: another kind of file, a damaged header, or data that is not all there.
    """

    def __init__(self, stream: BufferedReader) -> None:
        self._stream = stream
        self.size = os.fstat(stream.fileno()).st_size
        length = self._header_length()
        header = parse_json(self._read_at(8, length), "its header")
        metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
        if not isinstance(header, dict) or not isinstance(metadata, dict):
            raise ArtifactError("the artifact is damaged: its header is not a safetensors header")
        if not isinstance(metadata.get("growfx"), str):
            raise ArtifactError(
                "not a growfx artifact: its metadata has no entry `growfx`. A plain safetensors file is read by "
                "safetensors.torch.load_file"
            )
        self.metadata: str = metadata["growfx"]
        self._data = 8 + length
        self.tensors = _tensors(header, self.size - self._data)

    def read(self, name: str) -> NDArray[np.uint8]:
        """Read the bytes of a tensor into new memory."""
        tensor = self.tensors[name]
        return self._read_at(self._data + tensor.start, tensor.nbytes)

    def _header_length(self) -> int:
        start = self._read_at(0, min(SNIFFED, self.size)).tobytes()
        complaint = wrong_file(start)
        if complaint:
            raise ArtifactError(complaint)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or not start[8:].startswith(b"{") or length < 2:
            if 2 <= length <= MAX_HEADER and len(start) <= 8:
                raise ArtifactError(f"it ends after {self.size} bytes: the download is incomplete, fetch it again")
            raise ArtifactError("not a safetensors file, so not an artifact; or its first bytes are damaged")
        if length > MAX_HEADER:
            raise ArtifactError(f"its header claims {length} bytes; allowed are {MAX_HEADER}: the artifact is damaged")
        if length > self.size - 8:
            raise ArtifactError(f"it ends within its header: the download is incomplete ({self.size} bytes)")
        return length

    def _read_at(self, start: int, count: int) -> NDArray[np.uint8]:
        data = np.empty(count, dtype=np.uint8)
        self._stream.seek(start)
        if self._stream.readinto(data.data) != count:
            raise ArtifactError("it became shorter while it was read: another program is writing it")
        return data


def open_regular(file: Path) -> BufferedReader:
    """Open a regular file for reading; a device, pipe or socket is refused without waiting for it.

    Raises:
        ArtifactError: not a regular file.
        OSError: it cannot be opened.
    """
    # Opening a pipe would wait for its writer.
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ArtifactError(f"`{file.name}` is not a regular file but a folder, device, pipe or socket")
    return os.fdopen(handle, "rb")


def parse_json(data: NDArray[np.uint8] | bytes, what: str) -> Any:
    """JSON in which no key stands twice in an object.

    Raises:
        ArtifactError: not UTF-8, not JSON, nested too deep, or a repeated key.
    """
    try:
        return json.loads(bytes(data).decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the artifact is damaged: {what} is not JSON ({error})") from error


def wrong_file(start: bytes) -> str | None:
    """What another kind of file its first bytes show, and what to do; None for one that may be safetensors."""
    if start[8:9] == b"{" and not start.startswith(_LFS):
        return None
    # Cut short within the length of its header, whose lowest byte may look like anything.
    if 4 < len(start) <= 8 and not any(start[4:]):
        return None
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, complaint in _FOREIGN:
        if text.startswith(magic):
            return complaint
    # An ONNX file begins with its format version (field 1, a small number) and its producer (field 2, a string).
    if len(start) > 3 and start[0] == 0x08 and start[1] < 0x40 and start[2] in (0x12, 0x1A, 0x3A):
        return "it seems to be an ONNX file, not an artifact; load it with onnxruntime"
    return None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"`{twice}` stands in it twice")
    return found


def _tensors(header: Mapping[str, Any], available: int) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        tensors[name] = _tensor(name, entry)
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            raise ArtifactError(f"the artifact is damaged: `{name}` overlaps another tensor or follows a hole")
        end += tensor.nbytes
    if end > available:
        raise ArtifactError(
            f"its tensors take {end} bytes and {available} are there: the download is incomplete, fetch it again"
        )
    if end < available:
        raise ArtifactError(f"the artifact is damaged: {available - end} bytes follow its last tensor")
    return tensors


def _tensor(name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ArtifactError(f"the artifact is damaged: its header says of `{name}` not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _STORED:
        raise ArtifactError(f"the artifact is damaged: dtype `{dtype}` of `{name}` is none of {', '.join(_STORED)}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise ArtifactError(f"the artifact is damaged: shape or offsets of `{name}` in its header are not sizes")
    start, end = offsets
    if end - start != prod(shape) * ITEMSIZES[dtype]:
        raise ArtifactError(f"the artifact is damaged: `{name}` does not have the bytes of {dtype} {tuple(shape)}")
    return StoredTensor(dtype, tuple(shape), start, end - start)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)
