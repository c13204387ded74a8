"""Write the plan of a network as bytes: the file `network.gfx`.

    GFX1 | version, 32 bits | SHA-256 of what follows | body

All numbers are little-endian. In the body, counts and ids have seven bits a byte, lowest first, with the highest bit
set in all bytes but the last; signed ones are folded (0, -1, 1, -2, ...); floats are IEEE single precision. In order:
names of kernels; number of buffers; values (shape, buffer); constants (shape, codecs and lengths of their streams);
inputs; outputs; steps; then the streams of the constants one after the other. Weights are coded as in artifacts
(`growfx.artifact.codec`), so that a sparse network is as small.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from growfx.artifact.codec import encode_index, encode_values
from growfx.errors import ConfigError
from growfx.runtime.native.plan import OPERATIONS, WITH_OPERAND, Constant, Plan, Shape, Step

__all__ = ["MAGIC", "VERSION", "network_bytes"]

MAGIC, VERSION = b"GFX1", 1
_CODECS = {"bitmask": 0, "gap8": 1, "gap8.huffman": 2}
_MOST_AXES, _MOST_ELEMENTS = 8, 2**31 - 1


def network_bytes(plan: Plan, *, compressed: bool = True) -> bytes:
    """The file of a plan.

    Args:
        plan: what to write.
        compressed: as small as it gets; else quick to write and to read, for a network that stays in the process.

    Raises:
        ConfigError: a tensor of more axes or elements than the runtime has numbers for.
    """
    writer = _Writer()
    write_constant = _write_constant if compressed else _write_bits
    kernels = sorted({step.kernel for step in plan.steps})
    writer.number(len(kernels))
    for name in kernels:
        writer.number(len(name))
        writer.parts.append(name.encode("ascii"))
    writer.number(plan.slots)
    writer.number(len(plan.values))
    for value in plan.values:
        _write_shape(writer, value.shape)
        writer.number(value.slot)
    writer.number(len(plan.constants))
    streams = [part for constant in plan.constants for part in write_constant(writer, constant)]
    for ids in (plan.inputs, plan.outputs):
        writer.numbers(ids)
    writer.number(len(plan.steps))
    for step in plan.steps:
        _write_step(writer, step, kernels)
    body = b"".join([*writer.parts, *streams])
    return MAGIC + struct.pack("<I", VERSION) + hashlib.sha256(body).digest() + body


class _Writer:
    """Collects the parts of the body."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def number(self, value: int) -> None:
        """A number that is not negative."""
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
        self.parts.append(bytes(out))

    def integer(self, value: int) -> None:
        """Any integer."""
        self.number(value * 2 if value >= 0 else -value * 2 - 1)

    def real(self, value: float) -> None:
        """A float."""
        self.parts.append(struct.pack("<f", value))

    def numbers(self, values: Iterable[int]) -> None:
        """A count and so many numbers."""
        listed = list(values)
        self.number(len(listed))
        for value in listed:
            self.number(value)


def _write_shape(writer: _Writer, shape: Shape) -> None:
    _check_axes(len(shape))
    writer.number(len(shape))
    for size in shape:
        writer.number(size.per_batch)
        writer.integer(size.fixed)


def _check_axes(axes: int) -> None:
    if axes > _MOST_AXES:
        raise ConfigError(
            f"the native runtime takes tensors of up to {_MOST_AXES} axes, and the network has one of {axes}"
        )


def _write_constant(writer: _Writer, constant: Constant) -> Sequence[bytes | memoryview]:
    """Describes a constant and returns its streams, each by its smallest codec."""
    flat, streams = _write_form(writer, constant), list[bytes | memoryview]()
    if constant.mask is not None:
        positions = np.flatnonzero(constant.mask.numpy().reshape(-1)).astype(np.int64)
        flat = flat[positions]
        index = encode_index(positions, constant.tensor.numel())
        writer.number(positions.size)
        for value in (_CODECS[index.codec], index.raw_size, len(index.data)):
            writer.number(value)
        streams.append(index.data)
    values = encode_values(flat.view(np.uint32), floating=True)
    writer.number(int(values.codec == "planes"))
    for length in values.planes if values.codec == "planes" else ():
        writer.number(length)
    writer.number(len(values.data))
    return [*streams, values.data]


def _write_bits(writer: _Writer, constant: Constant) -> Sequence[bytes | memoryview]:
    """The same with positions as bits and values as they are in memory."""
    flat, streams = _write_form(writer, constant), list[bytes | memoryview]()
    if constant.mask is not None:
        mask = constant.mask.numpy().reshape(-1)
        flat = flat[mask]
        bits = np.packbits(mask).tobytes()
        for value in (flat.size, _CODECS["bitmask"], len(bits), len(bits)):
            writer.number(value)
        streams.append(bits)
    values = flat.astype("<f4", copy=False).tobytes()
    writer.number(0)
    writer.number(len(values))
    return [*streams, values]


def _write_form(writer: _Writer, constant: Constant) -> NDArray[np.float32]:
    """Write a constant's shape, and whether it has a mask; returns its elements in a row."""
    tensor = constant.tensor
    _check_axes(tensor.dim())
    if not 0 < tensor.numel() <= _MOST_ELEMENTS:
        raise ConfigError(f"the native runtime takes constants of 1 to {_MOST_ELEMENTS} elements, got {tensor.numel()}")
    writer.numbers(tensor.shape)
    writer.parts.append(bytes([constant.mask is not None]))
    return tensor.numpy().reshape(-1)


def _write_step(writer: _Writer, step: Step, kernels: Sequence[str]) -> None:
    writer.number(kernels.index(step.kernel))
    writer.numbers(step.inputs)
    writer.number(step.output)
    writer.number(len(step.ints))
    for value in step.ints:
        writer.integer(value)
    writer.number(len(step.floats))
    for value in step.floats:
        writer.real(value)
    writer.number(len(step.post))
    for post in step.post:
        operation = OPERATIONS.index(post.operation)
        writer.number(operation)
        if post.operation in WITH_OPERAND:
            assert post.operand is not None
            writer.number(post.operand)
        writer.real(post.a)
        writer.real(post.b)
