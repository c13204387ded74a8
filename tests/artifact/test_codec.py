import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growfx.artifact.codec import (
    IndexStream,
    ValueStream,
    decode_index,
    decode_values,
    encode_index,
    encode_values,
    index_complaint,
)
from growfx.errors import ArtifactError


def gaps_by_hand(positions: list[int]) -> bytes:
    """The definition of gap8, one weight at a time."""
    out, at = bytearray(), 0
    for position in positions:
        while position - at >= 255:
            out.append(255)
            at += 255
        out.append(position - at)
        at = position + 1
    return bytes(out)


def planes_by_hand(patterns: list[int], itemsize: int) -> list[bytes]:
    """The definition of planes, one value at a time."""
    width = 8 * itemsize
    rotated = [((p << 1) | (p >> (width - 1))) & ((1 << width) - 1) for p in patterns]
    return [bytes((r >> shift) & 255 for r in rotated) for shift in range(width - 8, -1, -8)]


def inflate(data: bytes) -> bytes:
    return zlib.decompress(data, wbits=-15)


def deflate(data: bytes, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    packer = zlib.compressobj(wbits=-15, strategy=strategy)
    return packer.compress(data) + packer.flush()


def draw(density: float, size: int, seed: int = 0) -> np.ndarray:
    return np.flatnonzero(np.random.default_rng(seed).random(size) < density)


def uint(values: list[int], itemsize: int) -> np.ndarray:
    return np.array(values, dtype=np.dtype(f"u{itemsize}"))


positions_in_a_tensor = st.integers(0, 3000).flatmap(
    lambda size: st.tuples(st.sets(st.integers(0, max(size - 1, 0)), max_size=size), st.just(size))
)


@settings(max_examples=150, deadline=None)
@given(positions_in_a_tensor)
def test_any_set_of_positions_survives_the_index_codec(case: tuple[set[int], int]):
    chosen, size = case
    positions = np.array(sorted(chosen), dtype=np.int64)
    stream = encode_index(positions, size)
    assert decode_index(stream, positions.size, size).tolist() == sorted(chosen)
    assert len(stream.data) <= min((size + 7) // 8, stream.raw_size) * 1.03 + 1


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 5000), max_size=60))
def test_gap_bytes_are_those_of_the_definition(chosen: set[int]):
    positions = sorted(chosen)
    stream = encode_index(np.array(positions, dtype=np.int64), 10**6)
    assert stream.codec in ("gap8", "gap8.huffman")
    raw = inflate(stream.data) if stream.codec == "gap8.huffman" else stream.data
    assert raw == gaps_by_hand(positions)


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 70000])
def test_gaps_around_the_skip_byte_are_exact(gap: int):
    positions = np.array([gap, 2 * gap + 1, 2 * gap + 2], dtype=np.int64)
    stream = IndexStream("gap8", len(gaps_by_hand(positions.tolist())), gaps_by_hand(positions.tolist()))
    assert decode_index(stream, 3, 10**6).tolist() == positions.tolist()
    assert decode_index(encode_index(positions, 10**6), 3, 10**6).tolist() == positions.tolist()


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5, 0.8])
def test_the_index_of_a_random_mask_is_within_two_percent_of_its_entropy(density: float):
    size = 400_000
    positions = draw(density, size)
    entropy = -density * np.log2(density) - (1 - density) * np.log2(1 - density)
    floor = size * entropy / 8
    assert len(encode_index(positions, size).data) < max(1.02 * floor, size / 8 * 1.001)


@pytest.mark.parametrize(("density", "codec"), [(0.05, "gap8.huffman"), (0.5, "bitmask")])
def test_the_index_codec_follows_the_density(density: float, codec: str):
    assert encode_index(draw(density, 100_000), 100_000).codec == codec


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=200), st.sampled_from([2, 4, 8]), st.booleans())
def test_any_bit_pattern_survives_the_value_codec(patterns: list[int], itemsize: int, floating: bool):
    bits = uint([p & ((1 << (8 * itemsize)) - 1) for p in patterns], itemsize)
    stream = encode_values(bits, floating=floating)
    decoded = decode_values(stream, bits.size, itemsize)
    assert decoded.tobytes() == bits.tobytes()
    assert len(stream.data) <= bits.nbytes


@pytest.mark.parametrize("itemsize", [2, 4])
def test_planes_are_those_of_the_definition(itemsize: int):
    exponents = np.random.default_rng(1).integers(120, 125, 3000) << (8 * itemsize - 9)
    patterns = [int(e) | (i % 7) | ((i % 2) << (8 * itemsize - 1)) for i, e in enumerate(exponents)]
    stream = encode_values(uint(patterns, itemsize), floating=True)
    assert stream.codec == "planes"
    start = 0
    for length, plain in zip(stream.planes, planes_by_hand(patterns, itemsize), strict=True):
        part = stream.data[start : start + length]
        assert (part if length == len(patterns) else inflate(part)) == plain
        start += length


def test_the_exponent_plane_of_normal_weights_shrinks_to_a_third():
    weights = np.random.default_rng(2).normal(0, 0.02, 100_000).astype(np.float32)
    stream = encode_values(weights.view(np.uint32), floating=True)
    assert stream.codec == "planes"
    assert stream.planes[0] < 0.34 * weights.size
    assert stream.planes[2:] == (weights.size, weights.size)


def test_special_values_keep_their_bits():
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38], dtype=np.float32)
    bits = np.tile(np.append(special.view(np.uint32), np.uint32(0x7F800001)), 50)  # and a signalling NaN
    stream = encode_values(bits, floating=True)
    assert stream.codec == "planes"
    assert decode_values(stream, bits.size, 4).tobytes() == bits.tobytes()


def test_integers_and_single_bytes_are_stored_raw():
    assert encode_values(uint([1, 2, 3] * 50, 4), floating=False).codec == "raw"
    assert encode_values(uint([1, 2, 3] * 50, 1), floating=True).codec == "raw"


def test_encoding_is_deterministic():
    positions = draw(0.1, 20_000)
    assert encode_index(positions, 20_000) == encode_index(positions.copy(), 20_000)


gap = deflate(bytes([1, 1, 1]))
BAD_INDEX: list[tuple[IndexStream, int, int, str]] = [
    (IndexStream("lzma", 3, b"abc"), 3, 9, "index codec `lzma` is unknown; allowed: bitmask, gap8"),
    (IndexStream("gap8", 3, bytes([1, 1, 1])), 2, 600, "3 positions instead of 2"),
    (IndexStream("gap8", 3, bytes([1, 1, 9])), 3, 9, "a position outside the tensor"),
    (IndexStream("gap8", 4, bytes([1, 1, 1])), 3, 600, "an index of the wrong length"),
    (IndexStream("gap8", 4, bytes([1, 1, 1, 255])), 3, 9, "an index of impossible length"),
    (IndexStream("gap8", 3, bytes([1, 1, 1])), 3, 2, "an index of impossible length"),
    (IndexStream("gap8.huffman", 2, gap), 2, 9, "a compressed stream of the wrong length"),
    (IndexStream("gap8.huffman", 4, gap), 4, 9, "a compressed stream of the wrong length"),
    (IndexStream("gap8.huffman", 3, gap[:-1]), 3, 9, "a compressed stream"),
    (IndexStream("gap8.huffman", 3, gap + b"x"), 3, 9, "followed by other bytes"),
    (IndexStream("gap8.huffman", 3, b"\xff\xff"), 3, 9, "a compressed stream is damaged"),
    (IndexStream("gap8.huffman", 2**40, gap), 2**40, 9, "an index of impossible length"),
    (IndexStream("bitmask", 1, b"\xff"), 8, 16, "a bitmask of the wrong length"),
    (IndexStream("bitmask", 1, b"\xc0"), 1, 8, "2 positions instead of 1"),
    (IndexStream("bitmask", 1, b"\x81"), 2, 7, "a position outside the tensor"),
]


@pytest.mark.parametrize(("stream", "nnz", "size", "text"), BAD_INDEX)
def test_a_damaged_index_is_refused(stream: IndexStream, nnz: int, size: int, text: str):
    with pytest.raises(ArtifactError, match=text):
        decode_index(stream, nnz, size)


BAD_VALUES: list[tuple[ValueStream, int, str]] = [
    (ValueStream("zstd", (), b""), 0, "value codec `zstd` is unknown; allowed: planes, raw"),
    (ValueStream("raw", (), b"\0" * 7), 2, "values of the wrong length"),
    (ValueStream("planes", (3, 3), b"\0" * 6), 3, "2 byte planes instead of 4"),
    (ValueStream("planes", (3, 3, 3, 3), b"\0" * 11), 3, "byte planes of the wrong length"),
    (ValueStream("planes", (4, 3, 3, 3), b"\0" * 13), 3, "a byte plane longer than its values"),
    (ValueStream("planes", (2, 9, 9, 9), b"\xff" * 29), 9, "a compressed stream is damaged"),
]


@pytest.mark.parametrize(("stream", "nnz", "text"), BAD_VALUES)
def test_damaged_values_are_refused(stream: ValueStream, nnz: int, text: str):
    with pytest.raises(ArtifactError, match=text):
        decode_values(stream, nnz, 4)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_bytes_give_an_artifact_error_or_valid_positions(data: Any):
    size = data.draw(st.integers(1, 300))
    codec = data.draw(st.sampled_from(["gap8", "gap8.huffman", "bitmask"]))
    body = data.draw(st.binary(max_size=60))
    raw = data.draw(st.integers(0, 300))
    nnz = data.draw(st.integers(0, 300))
    try:
        positions = decode_index(IndexStream(codec, raw, body), nnz, size)
    except ArtifactError:
        return
    assert positions.size == nnz
    assert np.all(np.diff(positions) > 0)
    assert nnz == 0 or 0 <= positions[0] <= positions[-1] < size


def test_a_deflate_bomb_is_stopped_at_the_stated_size():
    bomb = deflate(bytes(500_000))
    assert len(bomb) < 1_000
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="a compressed stream of the wrong length"):
        decode_index(IndexStream("gap8.huffman", 4_000, bomb), 4_000, 8_000)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_no_stream_may_claim_more_bytes_than_huffman_codes_hold():
    bomb = deflate(bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="claims more bytes than Huffman codes hold"):
        decode_index(IndexStream("gap8.huffman", 50_000_000, bomb), 50_000_000, 50_000_000)
    with pytest.raises(ArtifactError, match="claims more bytes than Huffman codes hold"):
        decode_values(ValueStream("planes", (len(bomb),) * 4, bomb * 4), 50_000_000, 4)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_the_most_compressible_streams_that_are_written_pass_their_own_bounds():
    """All weights present, all alike: every byte of the index and of each plane takes one bit."""
    for size in (1, 2, 7, 100, 100_000):
        for step in (1, 3, 255, 256):
            positions = np.arange(0, size, step)
            index = encode_index(positions, size)
            assert np.array_equal(decode_index(index, positions.size, size), positions)
            assert not index_complaint(index.codec, index.raw_size, len(index.data), positions.size, size)
            gaps = bytes(positions.size)
            packed = IndexStream("gap8.huffman", positions.size, deflate(gaps, zlib.Z_HUFFMAN_ONLY))
            assert not index_complaint("gap8.huffman", packed.raw_size, len(packed.data), positions.size, size)
            values = encode_values(np.zeros(positions.size, np.uint32), floating=True)
            assert np.array_equal(decode_values(values, positions.size, 4), np.zeros(positions.size))
