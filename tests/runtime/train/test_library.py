"""The library of training kernels: its files, its operators alone, and what tracers are told of them."""

import itertools
import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from growfx.runtime.train import library
from growfx.runtime.train.entries import Entries, Geometry, product
from growfx.runtime.train.library import TRAINING, training_status

built = pytest.mark.skipif(bool(training_status()), reason=training_status() or "the kernels are there")
ROOT = Path(__file__).parents[3]


def test_every_file_that_the_library_is_made_of_counts_in_its_fingerprint_and_is_packaged() -> None:
    files = [*TRAINING.sources, *TRAINING.headers]
    included = {
        (file.parent / name).resolve()
        for file in files
        for name in re.findall(r'#include "(.+)"', file.read_text(encoding="utf-8"))
    }
    assert included == {file.resolve() for file in TRAINING.headers}
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert data["growfx.runtime.train"] == ["*.cpp", "*.h"]
    assert all(file.read_text(encoding="utf-8").count("\n") <= 500 for file in files)


@built
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 2), (1, 3, 0, 1)]
)
def test_max_pooling_gives_what_torchs_gives(kernel: int, stride: int, padding: int, dilation: int) -> None:
    for batch, channels in itertools.product((1, 20, 32), (1, 5)):
        x = torch.randn(batch, channels, 9, 12)
        x[0, 0, 2, 3], x[-1, -1, 5, 5] = float("nan"), float("-inf")
        x.requires_grad_()
        expected = F.max_pool2d(x, kernel, stride, padding, dilation)
        gradient = torch.randn_like(expected)
        (wanted,) = torch.autograd.grad(expected, x, gradient)
        pairs = ([v, v] for v in (kernel, stride, padding, dilation))
        out, _ = torch.ops.growfx.max_pool(x, *pairs, list(expected.shape[2:]))
        (found,) = torch.autograd.grad(out, x, gradient)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@built
@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (20, 5, 7, 3), (33, 17, 16), (40, 70), (16, 3, 2, 3, 4)])
def test_a_change_of_layout_changes_no_value_and_is_undone(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape).to(dtype)
        inner = torch.ops.growfx.batch_inner(x)
        assert torch.equal(inner, x.float())
        assert shape[0] == 1 or inner.stride(0) == 1
        outer = torch.ops.growfx.batch_outer(inner, dtype)
        assert torch.equal(outer, x)
        assert outer.is_contiguous()


@built
def test_tracers_are_told_the_shapes_and_strides_that_the_operators_give() -> None:
    ops, mask = torch.ops.growfx, torch.rand(8, 5, 3, 3) < 0.3
    geometry = Geometry((3, 3), (2, 2), (1, 1), (1, 1), (1, 1))
    e = Entries.of(mask, mask.stride(), geometry, [8, 8])
    tables = (e.start, e.source, e.back_start, e.back_source, e.back_order, [3, 3], [2, 2], [1, 1], [1, 1])
    weight, x = torch.randn(8, 5, 3, 3), torch.randn(32, 5, 16, 16)

    def run(x: Tensor, weight: Tensor, *tables: object) -> list[Tensor]:
        values = ops.gather_entries(weight, tables[0])
        out = ops.sparse_product(ops.batch_inner(x), values, None, *tables[1:], [32, 8, 8, 8])
        normed, *moments = ops.norm(out, None, None, None, None, None, 1e-5, True)
        pooled = ops.max_pool(normed, [3, 3], [2, 2], [1, 1], [1, 1], [4, 4])
        return [values, out, normed, *moments, *pooled, ops.batch_outer(out, torch.float32)]

    real = run(x, weight, e.index, *tables)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in (x, weight, e.index, *tables)]
        told = run(*fakes)
    assert [(t.shape, t.stride(), t.dtype) for t in told] == [(t.shape, t.stride(), t.dtype) for t in real]
    assert library.padded_plane(128) == 144


@built
@pytest.mark.filterwarnings("ignore")  # torch's own, about its compiler
@pytest.mark.parametrize("kernel", [(3, 3), ()])
def test_compiled_code_that_calls_the_operators_gives_what_they_give(kernel: tuple[int, ...]) -> None:
    ones = (1,) * len(kernel)
    mask, geometry = torch.rand(8, 5, *kernel) < 0.3, Geometry(kernel, ones, ones, ones, ones)
    size = [6, 6] if kernel else []
    entries = Entries.of(mask, mask.stride(), geometry, size)
    weight, bias = (torch.randn(shape).requires_grad_() for shape in (mask.shape, (8,)))
    x = torch.randn(16, 5, *size).requires_grad_()

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return product(x * 2, weight, bias, entries, geometry, size).relu().square().mean()

    expected = call(x, weight, bias)
    wanted = torch.autograd.grad(expected, (x, weight, bias))
    found = torch.compile(call, backend="aot_eager")(x, weight, bias)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, (x, weight, bias)), wanted, strict=True):
        torch.testing.assert_close(a, b)
