"""Byte codecs for the positions and the values of active weights. Bit-exact.

Index codecs, for ascending positions below `size`:

* `gap8`: one byte per weight. A byte b < 255 skips b positions, then stands one weight; 255 skips 255
  positions without a weight (the relative index of Deep Compression, arXiv:1510.00149, section 3).
* `gap8.huffman`: the same bytes as raw deflate with Huffman codes only. Gaps of a random mask are geometric
  and have no repeats to find; the code comes within about one percent of the entropy size * H(density).
* `bitmask`: one bit per position, highest bit first, padded with zeros.

Value codecs, for the weights' bit patterns as unsigned integers:

* `raw`: the native bytes, little-endian.
* `planes`: every pattern is rotated left by one bit, so that the sign becomes the lowest bit and the exponent
  fills the highest byte, then split into byte planes, highest first. A plane shorter than the number of
  weights is raw deflate with Huffman codes only; one of exactly that length is stored unchanged.

Decoders do not trust their input: they never produce more bytes than asked for, and refuse a stream that is
too short, too long, or that points outside the tensor.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from growfx.errors import ArtifactError

__all__ = [
    "INDEX_CODECS",
    "VALUE_CODECS",
    "IndexStream",
    "Positions",
    "ValueStream",
    "decode_index",
    "decode_values",
    "encode_index",
    "encode_values",
    "index_complaint",
    "values_complaint",
]

INDEX_CODECS = ("bitmask", "gap8", "gap8.huffman")
VALUE_CODECS = ("planes", "raw")

# A bitmask is fixed-size and decodes without inflating, so it is preferred up to this excess.
_BITMASK_EXCESS = 1.02
# Inflating a plane costs more than reading it; below this saving it is stored unchanged.
_PLANE_SAVING = 0.01
_SKIP = 255

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class IndexStream:
    """Encoded positions: codec name, size in bytes before deflate, bytes."""

    codec: str
    raw_size: int
    data: bytes | memoryview


@dataclass(frozen=True)
class ValueStream:
    """Encoded values: codec name, size in bytes of each plane (empty for `raw`), bytes."""

    codec: str
    planes: tuple[int, ...]
    data: bytes | memoryview


def encode_index(positions: Positions, size: int) -> IndexStream:
    """Encode ascending, distinct `positions` below `size` by the smallest codec."""
    gaps = _to_gaps(positions)
    limit = (size + 7) // 8 / _BITMASK_EXCESS
    # No Huffman code is shorter than the entropy, so deflating can be left out where the bitmask wins anyway.
    if limit <= min(gaps.size, _entropy(gaps) * gaps.size):
        return _to_bitmask(positions, size)
    packed = _deflate(gaps.tobytes())
    if limit <= min(gaps.size, len(packed)):
        return _to_bitmask(positions, size)
    if len(packed) < gaps.size:
        return IndexStream("gap8.huffman", gaps.size, packed)
    return IndexStream("gap8", gaps.size, gaps.tobytes())


def index_complaint(codec: str, raw_size: int, stored: int, nnz: int, size: int) -> str:
    """Return why the sizes of an index cannot be right, before it is read; "" when they can.

    Args:
        codec: one of INDEX_CODECS.
        raw_size: bytes before deflate.
        stored: bytes as they are stored.
        nnz: weights it gives the positions of.
        size: elements of the tensor.
    """
    if codec == "bitmask":
        return "" if raw_size == stored == (size + 7) // 8 else "a bitmask of the wrong length"
    # A byte for every weight, and at most one for every 255 other elements.
    if not nnz <= raw_size <= nnz + (size - nnz) // _SKIP:
        return "an index of impossible length"
    if codec == "gap8":
        return "" if stored == raw_size else "an index of the wrong length"
    return _huffman_complaint(raw_size, stored)


def values_complaint(codec: str, planes: Sequence[int], nnz: int, itemsize: int) -> str:
    """The same for the byte planes of `nnz` values; `raw` ones have none."""
    if codec == "raw":
        return ""
    if len(planes) != itemsize:
        return f"{len(planes)} byte planes instead of {itemsize}"
    if any(length > nnz for length in planes):
        return "a byte plane longer than its values"
    return next(filter(None, (_huffman_complaint(nnz, length) for length in planes)), "")


def _huffman_complaint(raw_size: int, stored: int) -> str:
    """Without repeats to refer to every byte takes a bit: so a short file cannot ask for much memory."""
    if raw_size > 8 * stored:
        return "a compressed stream that claims more bytes than Huffman codes hold"
    return "" if stored <= raw_size + raw_size // 1024 + 64 else "a compressed stream longer than its bytes"


def decode_index(stream: IndexStream, nnz: int, size: int) -> Positions:
    """Ascending positions of the `nnz` weights in a tensor of `size` elements.

    Raises:
        ArtifactError: unknown codec, or a stream that does not give exactly `nnz` positions below `size`.
    """
    if stream.codec not in INDEX_CODECS:
        raise ArtifactError(f"index codec `{stream.codec}` is unknown; allowed: {', '.join(INDEX_CODECS)}")
    complaint = index_complaint(stream.codec, stream.raw_size, len(stream.data), nnz, size)
    _require(not complaint, complaint)
    if stream.codec == "bitmask":
        bits = np.unpackbits(np.frombuffer(stream.data, dtype=np.uint8))
        positions = np.flatnonzero(bits.view(np.bool_)).astype(np.int64, copy=False)
    else:
        packed = stream.codec == "gap8.huffman"
        data = _inflate(stream.data, stream.raw_size) if packed else stream.data
        positions = _from_gaps(np.frombuffer(data, dtype=np.uint8))
    _require(positions.size == nnz, f"{positions.size} positions instead of {nnz}")
    _require(nnz == 0 or int(positions[-1]) < size, "a position outside the tensor")
    return positions


def encode_values(bits: NDArray[np.unsignedinteger], *, floating: bool) -> ValueStream:
    """Encode bit patterns; `floating`: sign, exponent and mantissa in that order, as in every IEEE format."""
    little = bits.astype(bits.dtype.newbyteorder("<"), copy=False)
    if not floating or bits.itemsize == 1:
        return ValueStream("raw", (), little.tobytes())
    planes = [_encode_plane(plane) for plane in _to_planes(little)]
    data = b"".join(planes)
    if len(data) >= bits.nbytes:
        return ValueStream("raw", (), little.tobytes())
    return ValueStream("planes", tuple(len(plane) for plane in planes), data)


def decode_values(stream: ValueStream, nnz: int, itemsize: int) -> NDArray[np.unsignedinteger]:
    """The `nnz` bit patterns of `itemsize` bytes each.

    Raises:
        ArtifactError: unknown codec, or a stream that does not give exactly `nnz` values.
    """
    dtype = np.dtype(f"<u{itemsize}")
    if stream.codec == "raw":
        _require(len(stream.data) == nnz * itemsize, "values of the wrong length")
        return np.frombuffer(stream.data, dtype=dtype).astype(dtype.newbyteorder("="), copy=False)
    if stream.codec != "planes":
        raise ArtifactError(f"value codec `{stream.codec}` is unknown; allowed: {', '.join(VALUE_CODECS)}")
    complaint = values_complaint(stream.codec, stream.planes, nnz, itemsize)
    _require(not complaint, complaint)
    _require(sum(stream.planes) == len(stream.data), "byte planes of the wrong length")
    planes: list[NDArray[np.uint8]] = []
    start = 0
    for length in stream.planes:
        planes.append(_decode_plane(stream.data[start : start + length], nnz))
        start += length
    return _from_planes(planes, nnz).astype(dtype.newbyteorder("="), copy=False)


def _to_bitmask(positions: Positions, size: int) -> IndexStream:
    mask = np.zeros(size, dtype=np.bool_)
    mask[positions] = True
    bits = np.packbits(mask).tobytes()
    return IndexStream("bitmask", len(bits), bits)


def _to_gaps(positions: Positions) -> NDArray[np.uint8]:
    gaps = np.diff(positions, prepend=-1) - 1
    wide = np.flatnonzero(gaps >= _SKIP)
    skips = np.repeat(wide, gaps[wide] // _SKIP)
    gaps[wide] %= _SKIP
    return np.insert(gaps.astype(np.uint8), skips, _SKIP)


def _from_gaps(stream: NDArray[np.uint8]) -> Positions:
    weights = stream != _SKIP
    after = np.cumsum(stream, dtype=np.int64)
    after += np.cumsum(weights, dtype=np.int64)
    return after[weights] - 1


def _to_planes(bits: NDArray[np.unsignedinteger]) -> list[NDArray[np.uint8]]:
    width = 8 * bits.itemsize
    rotated = (bits << bits.dtype.type(1)) | (bits >> bits.dtype.type(width - 1))
    columns = rotated.astype(rotated.dtype.newbyteorder(">")).view(np.uint8).reshape(bits.size, bits.itemsize)
    return [np.ascontiguousarray(columns[:, i]) for i in range(bits.itemsize)]


def _from_planes(planes: Sequence[NDArray[np.uint8]], nnz: int) -> NDArray[np.unsignedinteger]:
    itemsize = len(planes)
    columns = np.empty((nnz, itemsize), dtype=np.uint8)
    for i, plane in enumerate(planes):
        columns[:, itemsize - 1 - i] = plane
    dtype = np.dtype(f"<u{itemsize}")
    rotated = columns.view(dtype).reshape(nnz)
    return (rotated >> dtype.type(1)) | (rotated << dtype.type(8 * itemsize - 1))


def _encode_plane(plane: NDArray[np.uint8]) -> bytes:
    if _entropy(plane) < 1 - _PLANE_SAVING:
        packed = _deflate(plane.tobytes())
        if len(packed) < plane.size:
            return packed
    return plane.tobytes()


def _entropy(stream: NDArray[np.uint8]) -> float:
    """Bytes needed per byte of `stream` when every byte is coded alone."""
    counts = np.bincount(stream, minlength=256)
    shares = counts[counts > 0] / max(stream.size, 1)
    return -float((shares * np.log2(shares)).sum()) / 8


def _decode_plane(data: bytes | memoryview, nnz: int) -> NDArray[np.uint8]:
    return np.frombuffer(data if len(data) == nnz else _inflate(data, nnz), dtype=np.uint8)


def _deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(data) + packer.flush()


def _inflate(data: bytes | memoryview, size: int) -> bytes:
    """Exactly `size` bytes: a stream that holds more is stopped one byte beyond."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        raw = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise ArtifactError(f"a compressed stream is damaged ({error})") from error
    _require(len(raw) == size, "a compressed stream of the wrong length")
    _require(unpacker.eof, "a compressed stream without its end")
    _require(not unpacker.unused_data, "a compressed stream followed by other bytes")
    return raw


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ArtifactError(f"the artifact is damaged: {what}")
