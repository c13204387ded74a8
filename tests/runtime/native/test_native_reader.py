"""Files that are damaged, foreign or hostile end in a clear error, never in a crash or other numbers."""

import hashlib
import random
import resource
import struct

import pytest
import torch
from native_nets import Classifier

import growfx
from growfx.deploy.native.export import native_plan
from growfx.errors import ArtifactError, ConfigError
from growfx.passes.lower.plan.file import network_bytes
from growfx.runtime.native.library import NativeNetwork
from growfx.runtime.native.plan import Constant, Plan, Size, Step, Value

HEADER = 40


def sealed(body: bytes) -> bytes:
    """A file whose checksum is right."""
    return b"GFX1" + struct.pack("<I", 1) + hashlib.sha256(body).digest() + body


@pytest.fixture(scope="module")
def data() -> bytes:
    torch.manual_seed(0)
    net = growfx.wrap(Classifier(), torch.randn(1, 3, 16, 16), density=0.4).eval()
    return network_bytes(native_plan(net))


def test_a_foreign_file_a_newer_version_and_a_cut_file_are_named(data: bytes) -> None:
    for other, words in [
        (b"", "GFX1"),
        (b"PK\x03\x04" + data[4:], "GFX1"),
        (data[:4] + struct.pack("<I", 7) + data[8:], "version 7"),
        (data[:30], "cut short"),
        (data[:-1], "damaged"),
        (data + b"\0", "damaged"),
        (sealed(data[HEADER:-1]), "too early"),
        (sealed(data[HEADER:] + b"\0"), "behind its end"),
    ]:
        with pytest.raises(ArtifactError, match=words):
            NativeNetwork(other)


def plan_with(size: int, constant: Constant, kernel: str, *ints: int) -> bytes:
    """A file of a few bytes: one step that makes a row of so many numbers out of a row of one and a constant."""
    shapes = [(Size(1, 0), Size(0, 1)), (Size(1, 0), Size(0, size))]
    values = tuple(Value(shape, slot) for slot, shape in enumerate(shapes))
    return network_bytes(Plan(values, (constant,), (Step(kernel, (0, 2), 1, ints),), (0,), (1,)))


ONE = Constant(torch.ones(1))
EMPTY = Constant(torch.zeros(1 << 20, 1), torch.zeros(1 << 20, 1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("file", "least"),
    [
        (plan_with(1 << 28, ONE, "binary", 0), 1 << 30),
        (plan_with(1 << 20, EMPTY, "linear"), 4 << 20),
        (plan_with(1, EMPTY, "binary", 0), 4 << 20),
    ],
    ids=["values", "sparse weight", "sparse weight that becomes dense"],
)
def test_a_small_file_that_asks_for_much_memory_is_refused_before_it_is_allocated(file: bytes, least: int) -> None:
    assert len(file) < 1500
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=f"{least} bytes that are allowed for each row"):
        NativeNetwork(file, row_bytes=least)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_the_limit_of_memory_is_the_callers_and_grows_with_the_batch(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"the 1000 bytes .*growfx_open_bounded"):
        NativeNetwork(data, row_bytes=1000)
    with pytest.raises(ArtifactError, match="1 byte or more"):
        NativeNetwork(data, row_bytes=0)
    needed = 64 << 10
    net = NativeNetwork(data, row_bytes=needed)
    expected = NativeNetwork(data)
    for batch in (1, 40, 2):
        x = torch.randn(batch, 3, 16, 16)
        assert torch.equal(net(x)[0], expected(x)[0])


def mutated(data: bytes, random_: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(random_.randint(1, 3)):
        at = random_.randrange(len(made))
        kind = random_.randrange(4)
        if kind == 0:
            made[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            made[at] = random_.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del made[at : at + random_.randint(1, 8)]
        else:
            made[at:at] = random_.randbytes(random_.randint(1, 8))
    return bytes(made)


def test_two_thousand_mutations_end_in_a_clear_error_or_the_same_outputs(data: bytes) -> None:
    x = torch.randn(2, 3, 16, 16)
    expected = NativeNetwork(data)(x)
    random_, refused = random.Random(0), 0
    for _ in range(2000):
        other = mutated(data, random_)
        try:
            assert all(torch.equal(a, b) for a, b in zip(NativeNetwork(other)(x), expected, strict=True))
        except ArtifactError as error:
            refused += bool(str(error))
        else:
            refused += other == data
    assert refused == 2000


def test_mutations_under_a_right_checksum_end_in_a_clear_error_or_in_numbers(data: bytes) -> None:
    """Half of them in the description of the network, which is short beside its weights."""
    random_, refused, ran = random.Random(1), 0, 0
    for i in range(2000):
        body = data[HEADER:]
        head = 700 if i % 2 else len(body)
        other = sealed(mutated(body[:head], random_) + body[head:])
        try:
            net = NativeNetwork(other)
            shapes = net.input_shapes(2)
            if sum(torch.Size(shape).numel() for shape in shapes) < 100_000:
                net(*(torch.randn(shape) for shape in shapes))
            ran += 1
        except (ArtifactError, ConfigError) as error:
            refused += bool(str(error))
    assert refused + ran == 2000
    assert refused > 500
    assert ran > 100


def test_inputs_of_another_size_and_a_batch_of_nothing_are_refused(data: bytes) -> None:
    net = NativeNetwork(data)
    for x in (
        torch.randn(1, 3, 16, 15),
        torch.randn(0, 3, 16, 16),
        torch.randn(1, 3, 16, 16).double(),
        torch.tensor(1.0),
    ):
        with pytest.raises(ConfigError, match="expected float32 inputs of shapes"):
            net(x)
    with pytest.raises(ConfigError, match="expected 1 to 256 threads, got 0"):
        NativeNetwork(data, threads=0)
