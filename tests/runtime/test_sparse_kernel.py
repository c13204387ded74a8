"""The sparse CPU kernel against torch's dense layers in float64."""

import itertools
import os
import random
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from error_facts import facts
from places import ROOT
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from growfx.errors import ConfigError
from growfx.runtime import kernel_build
from growfx.runtime.sparse_kernel import SparseWeight, conv2d, kernel_status, linear

built = pytest.mark.skipif(bool(kernel_status()), reason=kernel_status() or "the kernel is there")

KERNELS = [(1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (3, 2)]
PLANES = [(1, 1), (2, 3), (4, 4), (7, 7), (9, 5), (14, 14), (16, 17), (28, 28), (33, 12), (57, 57)]
PADDINGS, DILATIONS = [(0, 0), (1, 1), (3, 3), (1, 0), (0, 2)], [(1, 1), (2, 2), (2, 1)]


def random_mask(shape: tuple[int, ...], density: float) -> Tensor:
    mask = torch.rand(shape) < density
    mask[shape[0] // 2] = False
    return mask


def dense(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, **geometry) -> Tensor:
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), torch.where(mask, weight, 0).double(), bias, **geometry)


def error(out: Tensor, expected: Tensor) -> float:
    return ((out - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@built
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k[0]}x{k[1]}")
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_convolutions_equal_dense_ones_over_the_active_entries(kernel, stride: int, batch: int) -> None:
    draw = random.Random(f"{kernel} {stride} {batch}")
    sweep = [
        (plane, padding, dilation)
        for plane, padding, dilation in itertools.product(PLANES, PADDINGS, DILATIONS)
        if all(n + 2 * p > d * (k - 1) for n, k, p, d in zip(plane, kernel, padding, dilation, strict=True))
    ]
    for plane, padding, dilation in draw.sample(sweep, 16):
        geometry = {"stride": (stride, draw.choice([stride, 1])), "padding": padding, "dilation": dilation}
        inputs, outputs = draw.choice([1, 6]), draw.choice([2, 9])
        weight = torch.randn(outputs, inputs, *kernel)
        mask = random_mask(tuple(weight.shape), draw.choice([0.05, 0.4]))
        x, bias = torch.randn(batch, inputs, *plane), draw.choice([None, torch.randn(outputs)])
        expected = dense(x, weight, mask, bias, **geometry)
        residual, relu = draw.choice([None, torch.randn(expected.shape)]), draw.choice([False, True])
        out = conv2d(x, SparseWeight.pack(weight, mask, **geometry), bias, residual=residual, relu=relu)
        expected = expected if residual is None else expected + residual
        assert error(out, expected.relu() if relu else expected) < 1e-5, (plane, geometry)
        assert out.is_contiguous()


@built
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("shape", [(1, 40), (3, 40), (40,), (2, 97, 40), (300, 40), (1, 1, 1, 40)], ids=str)
def test_linear_layers_equal_dense_ones(shape, density: float) -> None:
    weight, bias, x = torch.randn(70, 40), torch.randn(70), torch.randn(shape)
    mask = torch.rand(70, 40) < density
    packed = SparseWeight.pack(weight, mask)
    expected = F.linear(x.double(), (weight * mask).double(), bias.double())
    assert packed.nnz == mask.sum()
    assert linear(x, packed, bias).shape == expected.shape
    assert error(linear(x, packed, bias), expected) < 1e-5
    assert error(linear(x, packed, bias, relu=True), expected.relu()) < 1e-5
    assert error(linear(x, packed), expected - bias) < 1e-5


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(33, 40), (16, 5), (7, 50)])
@pytest.mark.parametrize("batch", [15, 20, 150])
def test_batches_of_single_values_are_matrices(batch: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight, x = torch.randn(outputs, inputs, 1, 1).to(dtype), torch.randn(batch, inputs, 1, 1).to(dtype)
    bias, residual = torch.randn(outputs).to(dtype), torch.randn(batch, outputs, 1, 1).to(dtype)
    mask = random_mask((outputs, inputs, 1, 1), 0.4)
    expected = (dense(x, weight, mask, bias) + residual.double()).relu()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    outputs_of = [SparseWeight.pack(weight, mask, stride=stride) for stride in ((1, 1), (2, 2))]
    assert all(error(conv2d(x, w, bias, residual=residual, relu=True), expected) < tolerance for w in outputs_of)
    packed = SparseWeight.pack(weight[:, :, 0, 0], mask[:, :, 0, 0])
    plain = dense(x, weight, mask, bias).relu()[:, :, 0, 0]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert error(linear(x[:, :, 0, 0], packed, bias, relu=True), plain) < tolerance


@built
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_an_empty_mask_leaves_the_bias_and_a_full_one_the_dense_layer(density: float) -> None:
    weight, bias, x = torch.randn(5, 4, 3, 3), torch.randn(5), torch.randn(2, 4, 9, 9)
    mask = torch.full(weight.shape, bool(density))
    out = conv2d(x, SparseWeight.pack(weight, mask, padding=(1, 1)), bias)
    assert error(out, dense(x, weight, mask, bias, padding=1)) < 1e-5


@built
@pytest.mark.parametrize("plane", [(1, 1), (5, 5), (20, 20)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_bfloat16_is_summed_in_float32_and_rounded_once(kernel: int, plane) -> None:
    weight, bias = torch.randn(8, 64, kernel, kernel).bfloat16(), torch.randn(8).bfloat16()
    mask = random_mask(tuple(weight.shape), 0.5)
    x, residual = torch.randn(3, 64, *plane).bfloat16(), torch.randn(3, 8, *plane).bfloat16()
    pad = (kernel // 2, kernel // 2)
    out = conv2d(x, SparseWeight.pack(weight, mask, padding=pad), bias, residual=residual)
    expected = dense(x, weight, mask, bias, padding=pad) + residual
    assert out.dtype == torch.bfloat16
    # Half a unit in the last of 8 significant bits, and what float32 sums lose before.
    assert ((out.double() - expected).abs() <= expected.abs() * 2**-8 * 1.01 + 1e-4).all()
    few = linear(x[..., 0, 0], SparseWeight.pack(weight[:, :, 0, 0], mask[:, :, 0, 0]), bias, relu=True)
    assert few.dtype == torch.bfloat16
    assert (few >= 0).all()


@built
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize(("plane", "kernel"), [((2, 2), 1), ((7, 7), 3), ((14, 14), 3), ((40, 40), 1)], ids=str)
def test_the_number_of_threads_changes_no_bit(plane, kernel: int, batch: int) -> None:
    weight, x = torch.randn(96, 64, kernel, kernel), torch.randn(batch, 64, *plane)
    mask = random_mask(tuple(weight.shape), 0.3) & (torch.rand(96)[:, None, None, None] < 0.7)
    packed = SparseWeight.pack(weight, mask, padding=(kernel // 2, kernel // 2))
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append(conv2d(x, packed, relu=True))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plane", [(3, 3), (18, 18)], ids=str)
def test_nan_and_infinity_go_where_active_entries_take_them(plane, dtype: torch.dtype) -> None:
    weight, x = torch.randn(12, 6, 3, 3).to(dtype), torch.randn(2, 6, *plane).to(dtype)
    mask = random_mask(tuple(weight.shape), 0.2)
    x[0, 1, 1, 1], x[1, 2, 0, 2], x[1, 3, 2, 0] = float("nan"), float("inf"), -float("inf")
    out = conv2d(x, SparseWeight.pack(weight, mask, padding=(1, 1)), relu=True)
    patches = F.unfold(x.float(), 3, padding=1)  # (2, 54, positions): a sum over active entries alone
    expected = torch.stack(
        [(w[m, None] * patches[:, m]).sum(1) for w, m in zip(weight.float().flatten(1), mask.flatten(1), strict=True)],
        1,
    )
    expected = expected.relu().view_as(out)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert out.isnan().any()
    assert out.isinf().any()


@built
def test_a_zero_under_the_mask_is_an_entry_and_a_weight_outside_it_is_none() -> None:
    weight, mask = torch.tensor([[0.0, float("nan")]]), torch.tensor([[True, False]])
    packed = SparseWeight.pack(weight, mask)
    assert packed.nnz == 1
    assert linear(torch.tensor([[float("inf"), 1.0]]), packed).isnan().all()
    assert linear(torch.tensor([[2.0, float("nan")]]), packed).item() == 0


@built
def test_inputs_of_any_strides_are_taken() -> None:
    weight = torch.randn(8, 6, 3, 3)
    mask = random_mask(tuple(weight.shape), 0.5)
    packed = SparseWeight.pack(weight, mask)
    x = torch.randn(2, 6, 17, 17)
    residual = torch.randn(2, 8, 15, 15)
    expected = conv2d(x, packed, residual=residual)
    last = {"memory_format": torch.channels_last}
    assert torch.equal(conv2d(x.contiguous(**last), packed, residual=residual.contiguous(**last)), expected)
    assert torch.equal(conv2d(x.mT.contiguous().mT, packed, residual=residual), expected)
    assert torch.equal(SparseWeight.pack(weight.contiguous(**last), mask.contiguous(**last)).value, packed.value)


@built
def test_empty_batches_give_empty_outputs() -> None:
    packed = SparseWeight.pack(torch.randn(3, 2, 3, 3), torch.ones(3, 2, 3, 3, dtype=torch.bool))
    assert conv2d(torch.randn(0, 2, 8, 8), packed).shape == (0, 3, 6, 6)
    assert linear(torch.randn(0, 2), SparseWeight.pack(torch.randn(3, 2), torch.ones(3, 2).bool())).shape == (0, 3)


@built
def test_a_weight_remembers_a_bounded_number_of_input_sizes() -> None:
    packed = SparseWeight.pack(torch.randn(3, 2, 3, 3), torch.ones(3, 2, 3, 3, dtype=torch.bool))
    bare = packed.nbytes
    for size in range(3, 40):
        conv2d(torch.randn(1, 2, size, size), packed)
    assert bare < packed.nbytes < bare + 20 * (packed.nnz * 4 + 200)


def full(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize(
    ("weight", "mask", "geometry", "message"),
    [
        (torch.zeros(2, 2).half(), torch.ones(2, 2).bool(), {}, facts("torch.float16", "torch.float32")),
        (*full(2, 2, 3), {}, facts("(2, 2, 3)")),
        (torch.zeros(2, 2), torch.ones(2, 2), {}, facts("mask", "torch.float32", "torch.bool")),
        (torch.zeros(2, 2), torch.ones(2, 3).bool(), {}, facts("mask", "(2, 3)", "(2, 2)")),
        (torch.zeros(2, 2, device="meta"), torch.ones(2, 2).bool(), {}, facts("weight", "meta", "mask", "cpu")),
        (*full(2, 2), {"stride": (2, 2)}, facts("linear", "`stride`")),
        (*full(2, 2, 3, 3), {"stride": (0, 1)}, facts("`stride`", "(0, 1)", 1)),
        (*full(2, 2, 3, 3), {"padding": (1, -1)}, facts("`padding`", "(1, -1)")),
        (*full(2, 2, 3, 3), {"dilation": (1, 1, 1)}, facts("`dilation`", "(1, 1, 1)")),
    ],
    ids=["float16", "3d", "float-mask", "mask-shape", "meta", "linear", "stride", "padding", "dilation"],
)
def test_weights_that_cannot_be_packed_are_refused(weight, mask, geometry, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparseWeight.pack(weight, mask, **geometry)


@built
@pytest.mark.parametrize(
    ("x", "more", "message"),
    [
        (torch.zeros(1, 3, 8, 8), {}, facts("(1, 3, 8, 8)", "(N, 2, H, W)")),
        (torch.zeros(2, 8, 8), {}, facts("(2, 8, 8)", "(N, 2, H, W)")),
        (torch.zeros(1, 2, 2, 8), {}, "too small for the kernel"),
        (torch.zeros(1, 2, 8, 8).double(), {}, facts("`x`", "torch.float64", "torch.float32")),
        (torch.zeros(1, 2, 8, 8, device="meta"), {}, facts("`x`", "meta")),
        (torch.zeros(1, 2, 8, 8, requires_grad=True), {}, facts("`x`", "gradient")),
        (torch.zeros(1, 2, 8, 8), {"bias": torch.zeros(4)}, facts("`bias`", "(4,)", "(3,)")),
        (
            torch.zeros(1, 2, 8, 8),
            {"residual": torch.zeros(1, 3, 8, 8)},
            facts("(1, 3, 8, 8)", "(1, 3, 6, 6)"),
        ),
        (
            torch.zeros(1, 2, 8, 8),
            {"residual": torch.zeros(1, 3, 6, 6).bfloat16()},
            facts("`residual`", "torch.bfloat16"),
        ),
    ],
    ids=["channels", "3d", "small", "double", "meta", "grad", "bias", "residual-shape", "residual-dtype"],
)
def test_inputs_that_do_not_fit_are_refused(x: Tensor, more, message: str) -> None:
    packed = SparseWeight.pack(*full(3, 2, 3, 3))
    with pytest.raises(ConfigError, match=message):
        conv2d(x, packed, **more)


@built
def test_a_refused_input_is_refused_again_after_one_that_fits() -> None:
    packed = SparseWeight.pack(*full(3, 2, 3, 3))
    conv2d(torch.zeros(1, 2, 8, 8), packed)
    with pytest.raises(ConfigError, match=facts("torch.float64")):
        conv2d(torch.zeros(1, 2, 8, 8).double(), packed)
    with torch.no_grad():
        conv2d(torch.zeros(1, 2, 8, 8, requires_grad=True), packed)


@built
def test_each_kind_of_weight_has_its_function() -> None:
    with pytest.raises(ConfigError, match=facts("`linear`")):
        conv2d(torch.zeros(1, 2, 1, 1), SparseWeight.pack(*full(3, 2)))
    with pytest.raises(ConfigError, match=facts("`conv2d`")):
        linear(torch.zeros(1, 2), SparseWeight.pack(*full(3, 2, 1, 1)))
    with pytest.raises(ConfigError, match=facts("(1, 3)", "(..., 2)")):
        linear(torch.zeros(1, 3), SparseWeight.pack(*full(3, 2)))


def test_an_image_beyond_32_bit_offsets_is_refused_before_anything_is_computed() -> None:
    packed = SparseWeight.pack(*full(1, 300, 1, 1))
    with pytest.raises(ConfigError, match=facts("32-bit")):
        packed.plan((1, 300, 3000, 3000))


def script(file: Path, body: str) -> str:
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def fresh_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`kernel_status` as the first call of a process says it, with a build folder of its own."""

    def status(**environment: str) -> str:
        for name, value in {"TORCH_EXTENSIONS_DIR": str(tmp_path), **environment}.items():
            monkeypatch.setenv(name, value)
        return kernel_build._load.__wrapped__()

    return status


def test_the_environment_switches_the_kernel_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROWFX_NO_KERNEL", "1")
    assert kernel_status() == "switched off by `GROWFX_NO_KERNEL`"
    with pytest.raises(ConfigError, match=facts("`GROWFX_NO_KERNEL`", "dense")):
        linear(torch.ones(1, 2), SparseWeight.pack(*full(3, 2)))


@pytest.mark.slow
def test_a_process_without_a_compiler_says_so_and_goes_on(tmp_path: Path) -> None:
    code = (
        "import torch; from growfx.errors import ConfigError; from growfx.runtime.sparse_kernel import *\n"
        "reason = kernel_status(); packed = SparseWeight.pack(torch.ones(1, 1), torch.ones(1, 1).bool())\n"
        "try: linear(torch.ones(1, 1), packed)\n"
        "except ConfigError as error: assert reason in str(error), error\n"
        "print(reason)"
    )
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.startswith("no C++ compiler: `no-such-compiler` cannot be run")
    assert run.stderr == ""


def test_a_failing_compiler_gives_its_first_error(tmp_path: Path, fresh_status) -> None:
    body = 'case "$*" in *" -o "*) echo "x.cpp:1: error: no room left" >&2; exit 1;; esac; exec c++ "$@"'
    assert fresh_status(CXX=script(tmp_path / "broken", body)) == "compiling failed: x.cpp:1: error: no room left"


def test_missing_ninja_is_named(tmp_path: Path, fresh_status) -> None:
    reason = fresh_status(CXX=script(tmp_path / "compiler", "exit 0"), PATH="/nowhere")
    assert reason.startswith("compiling needs `ninja`")


def test_a_folder_that_cannot_be_written_is_a_reason(tmp_path: Path, fresh_status) -> None:
    (tmp_path / "file").touch()
    reason = fresh_status(TORCH_EXTENSIONS_DIR=str(tmp_path / "file"))
    assert reason.startswith("the folder of compiled extensions cannot be used")


def test_a_library_that_cannot_be_loaded_is_built_again(tmp_path: Path, fresh_status, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    folder = tmp_path / f"growfx_sparse_{kernel_build._fingerprint()}"
    folder.mkdir()
    (folder / f"{folder.name}.so").write_text("half a library")
    (folder / "done").touch()
    assert fresh_status().startswith("no C++ compiler")
    assert not (folder / "done").exists()


def test_the_source_is_part_of_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    sources = [kernel_build.SOURCE, *kernel_build.HEADERS]
    for name in ("growfx.runtime", "growfx.runtime.train"):
        assert settings["package-data"][name] == ["*.cpp", "*.h"]
    for file in sources:
        assert file.parent == Path(kernel_build.__file__).parent
        assert file.read_text().count("\n") <= 450


class Traced(torch.nn.Module):
    """A convolution by the kernel, for those who trace it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(8, 6, 3, 3, generator=generator)
        mask = torch.rand(weight.shape, generator=generator) < 0.3
        self.packed = SparseWeight.pack(weight, mask, padding=(1, 1))
        self.dense = torch.where(mask, weight, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.packed, relu=True) + 1


@built
@pytest.mark.filterwarnings("ignore")  # torch's own, about its compiler
@pytest.mark.parametrize("how", ["export", "compile", "vmap", "fake"])
def test_the_kernel_can_be_traced(how: str) -> None:
    module, x = Traced(), torch.randn(2, 6, 9, 9)
    expected = torch.nn.functional.conv2d(x, module.dense, padding=1).relu() + 1
    with torch.no_grad():
        if how == "export":
            got = torch.export.export(module, (x,)).module()(x)
        elif how == "compile":
            got = torch.compile(module, backend="aot_eager")(x)
        elif how == "vmap":
            got = torch.vmap(module, in_dims=1, out_dims=1)(torch.stack([x, x], 1))[:, 1]
        else:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                assert module(mode.from_tensor(x)).shape == expected.shape
            got = module(x)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(module(x), expected)
