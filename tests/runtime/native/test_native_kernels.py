"""Each kernel of the native runtime against torch, on operators as networks use them."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from breadth import some
from native_nets import Function, largest_error, native
from torch import Tensor, nn

import growfx
from growfx.errors import TraceError
from growfx.runtime.native.plan import OPERATIONS
from growfx.runtime.native.sources import SOURCE_FOLDER

TOLERANCE = 2e-5

ONE = [
    *(F.relu, F.relu6, F.hardswish, F.hardsigmoid, F.silu, F.gelu, F.mish, F.elu, F.selu, F.celu, F.softplus),
    *(F.leaky_relu, F.hardtanh, torch.sigmoid, torch.tanh, torch.exp, torch.erf, torch.abs, torch.neg, torch.sin),
    *(torch.cos, torch.floor, torch.square, torch.round),
]


@pytest.mark.parametrize("function", ONE, ids=lambda f: f.__name__)
def test_functions_of_one_number_equal_torch_at_ordinary_and_extreme_numbers(
    function: Callable[[Tensor], Tensor],
) -> None:
    x = torch.cat([torch.linspace(-12, 12, 797), torch.tensor([0.0, -0.0, 1e-6, -1e-6, 30.0, -30.0])])
    made = native(Function(function), x[None])
    assert torch.allclose(made(x[None])[0], function(x[None]), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("decimals", [-1, 0, 1, 3])
def test_numbers_are_rounded_to_as_many_decimals_as_torch_does(decimals: int) -> None:
    x = torch.cat([torch.linspace(-12, 12, 797), torch.tensor([0.25, -0.75, 15.0, 25.0])])[None]
    function = Function(lambda x: torch.round(x, decimals=decimals))
    assert torch.allclose(native(function, x)(x)[0], function(x), rtol=1e-6)


@pytest.mark.parametrize("function", [F.relu, F.silu, F.gelu, torch.tanh, torch.sigmoid, torch.exp, F.hardswish])
def test_nan_infinity_and_huge_numbers_go_through_functions_as_in_torch(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor(
        [[torch.nan, torch.inf, -torch.inf, 1.0, 2.0, *(s * n for n in (40, 87.5, 89, 3e37) for s in (1, -1))]]
    )
    got, expected = native(Function(function), x)(x)[0], function(x)
    # torch's own gelu makes a NaN of infinity.
    assert torch.equal(got.isfinite(), expected.isfinite())
    assert torch.allclose(got[got.isfinite()], expected[expected.isfinite()])
    assert got[0, 0].isnan()


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1x1": (nn.Conv2d(7, 9, 1), (2, 7, 9, 11)),
    "1x1 stride 2": (nn.Conv2d(7, 9, 1, 2), (2, 7, 9, 11)),
    "1x1 padded": (nn.Conv2d(7, 9, 1, padding=1), (2, 7, 9, 11)),
    "3x3": (nn.Conv2d(6, 10, 3, padding=1), (3, 6, 17, 19)),
    "3x3 stride 2": (nn.Conv2d(6, 10, 3, 2, 1, bias=False), (3, 6, 40, 41)),
    "3x3 stride 3, dilated": (nn.Conv2d(6, 10, 3, 3, 2, dilation=2), (1, 6, 40, 41)),
    "5x3 uneven": (nn.Conv2d(4, 6, (5, 3), (2, 1), (2, 0), dilation=(1, 2)), (2, 4, 21, 33)),
    "7x7 stride 4": (nn.Conv2d(3, 8, 7, 4, 3), (1, 3, 64, 64)),
    "large bands": (nn.Conv2d(40, 12, 3, padding=1), (1, 40, 96, 90)),
    "small images of a batch": (nn.Conv2d(12, 9, 3, padding=1), (7, 12, 5, 4)),
    "one position": (nn.Conv2d(12, 9, 3), (3, 12, 3, 3)),
    "grouped": (nn.Conv2d(12, 8, 3, padding=1, groups=4), (2, 12, 14, 15)),
    "depthwise": (nn.Conv2d(9, 9, 5, 2, 2, groups=9), (2, 9, 23, 25)),
    "depthwise, more outputs": (nn.Conv2d(6, 18, 3, groups=6), (2, 6, 12, 12)),
    "depthwise 3x3": (nn.Conv2d(5, 5, 3, 1, 1, groups=5), (2, 5, 17, 35)),
    "depthwise 3x3 stride 2": (nn.Conv2d(5, 5, 3, 2, 1, groups=5, bias=False), (2, 5, 18, 37)),
    "depthwise 3x3 unpadded": (nn.Conv2d(20, 20, 3, 1, 0, groups=20), (2, 20, 9, 9)),
    "depthwise 5x5 of a small plane": (nn.Conv2d(70, 70, 5, 1, 2, groups=70), (2, 70, 7, 7)),
    "depthwise 5x5 stride 2": (nn.Conv2d(5, 5, 5, 2, 2, groups=5), (2, 5, 14, 14)),
    "depthwise 7x7": (nn.Conv2d(5, 5, 7, 1, 3, groups=5), (2, 5, 15, 20)),
    "depthwise 7x7 stride 2": (nn.Conv2d(5, 5, 7, 2, 3, groups=5), (2, 5, 15, 20)),
    "depthwise in bands": (nn.Conv2d(2, 2, 3, 1, 1, groups=2), (1, 2, 131, 230)),
    "depthwise in bands, stride 2": (nn.Conv2d(2, 2, 5, 2, 2, groups=2), (1, 2, 150, 301)),
    "depthwise, window wider than the plane": (nn.Conv2d(4, 4, 7, 1, 3, groups=4), (2, 4, 3, 2)),
    "depthwise, uneven, dilated": (nn.Conv2d(4, 4, (3, 5), (1, 3), (2, 4), (2, 3), groups=4), (2, 4, 19, 40)),
    "depthwise, padding far outside": (nn.Conv2d(3, 3, 3, 1, 9, groups=3), (2, 3, 5, 6)),
    "depthwise, stride beyond the window": (nn.Conv2d(3, 3, 2, 19, 0, groups=3), (2, 3, 50, 61)),
    "depthwise, outputs and a wide stride": (nn.Conv2d(3, 6, 3, 4, 1, groups=3), (2, 3, 50, 61)),
    "1x1 of one position": (nn.Conv2d(50, 70, 1), (3, 50, 1, 1)),
    "1x1 of a wide image": (nn.Conv2d(20, 24, 1), (2, 20, 20, 23)),
    "1x1 of many channels": (nn.Conv2d(300, 40, 1), (3, 300, 14, 14)),
    "3x3 of many channels": (nn.Conv2d(90, 33, 3, padding=1), (3, 90, 12, 13)),
    "1d": (nn.Conv1d(5, 7, 4, 2, 3), (2, 5, 50)),
    "1d grouped": (nn.Conv1d(6, 6, 3, groups=6, padding=1), (2, 6, 31)),
    "3d": (nn.Conv3d(3, 5, 3, (1, 2, 2), 1), (2, 3, 5, 12, 13)),
    "3d dilated": (nn.Conv3d(3, 5, (3, 1, 3), (2, 1, 1), (2, 0, 1), (2, 1, 1)), (2, 3, 7, 8, 9)),
    "3d pointwise": (nn.Conv3d(4, 5, 1), (2, 4, 3, 6, 7)),
    "transposed": (nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=True), (2, 6, 7, 8)),
    "transposed, grouped": (nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1, groups=2), (2, 6, 7, 8)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 3, 2), (2, 3, 11)),
    "linear": (nn.Linear(13, 30), (3, 13)),
    "linear of many rows": (nn.Linear(24, 17), (2, 77, 24)),
    "linear in blocks of columns": (nn.Linear(200, 90), (2, 45, 200)),
    "linear in blocks, a last tile of few rows": (nn.Linear(150, 60, bias=False), (1, 261, 150)),
    "linear of one row": (nn.Linear(300, 40, bias=False), (1, 300)),
    "linear of a few rows": (nn.Linear(70, 40), (5, 70)),
}


COMBINATIONS = list(itertools.product(CONVOLUTIONS, [1.0, 0.3], [1, 3]))
FOURTH = list(CONVOLUTIONS)[::4]


@pytest.mark.parametrize(
    ("kind", "density", "threads"),
    some(COMBINATIONS, lambda case: case[1:] == (0.3, 1) or (case[1:] == (1.0, 3) and case[0] in FOURTH)),
)
def test_convolutions_and_linear_layers_equal_torch_at_any_density(kind: str, density: float, threads: int) -> None:
    layer, shape = CONVOLUTIONS[kind]
    x = torch.randn(shape)
    net = growfx.wrap(nn.Sequential(layer), x, density=density).eval()
    made = native(net, x[:1], threads=threads)
    with torch.no_grad():
        for batch in (x, x[:1]):
            assert torch.allclose(made(batch)[0], net(batch), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("channels", "outputs", "groups"), [(24, 40, 1), (24, 3, 1), (70, 2, 2), (4, 1, 1)])
@pytest.mark.parametrize("size", [(3, 3), (9, 11), (14, 14)])
def test_convolutions_of_gated_channels_equal_torch(
    channels: int, outputs: int, groups: int, size: tuple[int, int]
) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.project = nn.Linear(channels, channels), nn.Conv2d(channels, outputs, 1, groups=groups)

        def forward(self, x: Tensor) -> Tensor:
            return self.project(x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None])

    x = torch.randn(5, channels, *size)
    for density in (0.1, 0.5, 1.0):
        net = growfx.wrap(Gated(), x, density=density).eval()
        made = native(net, x[:1], threads=2)
        for batch in (x, x[:1]):
            with torch.no_grad():
                assert torch.allclose(made(batch)[0], net(batch), rtol=1e-4, atol=2e-6)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _odd(x: Tensor) -> Tensor:
    """With a NaN, infinities and equal numbers."""
    return torch.where(x > 1, x * torch.inf, torch.where(x < -1, x.log(), x.round()))


def _comparisons(x: Tensor) -> Tensor:
    a, b = _odd(x), _odd(-x.flip(1))
    found = [a > b, a >= b, a < b, a <= b, a == b, a != b, a >= 0, a <= 0, a > 0, a < 0, a == 0, a != 0, a == a]
    found += [a >= -torch.inf, a <= torch.inf, a * 0 + 1 >= b]
    return torch.stack([truth.float() for truth in found], 1)


def _truths(x: Tensor) -> Tensor:
    a, b, number = x > 0, x.flip(1) > 0.5, _odd(x)
    found = [a + b, a * b, a & b, a | b, a ^ b, ~a, a == b, number.bool(), torch.logical_not(number), a | True]
    found += [torch.logical_and(number, b), torch.logical_or(number, b), torch.logical_xor(number, b)]
    found += [number.any(1, keepdim=True).expand(a.shape), (x != 9).all(1, keepdim=True).expand(a.shape)]
    return torch.stack([truth.float() for truth in found], 1) + (a + b).sum(1)[:, None, None]


def _retyped(x: Tensor) -> Tensor:
    """Numbers in tensors of another type: any but 0 is true, and whole numbers have no fraction."""
    truth = x > 0
    copied = torch.zeros_like(x, dtype=torch.bool)
    copied.copy_(x.round())
    whole = torch.full_like(x, 2.7, dtype=torch.int64) + torch.full((len(x), 1), 5, dtype=torch.bool)
    found = [copied, truth.new_full(x.shape, 3), F.pad(truth, (1, 0), value=3)[:, 1:], truth.masked_fill(x > 1, 3)]
    return torch.stack([*(number.float() for number in found), F.pad(truth, (1, 0), value=3)[:, :-1] + whole], 1)


def _without(x: Tensor) -> Tensor:
    return torch.add(x, x.exp(), alpha=0) + torch.sub(x, x * x + 1, alpha=0) + torch.rsub(x, 2, alpha=0)


def _nothing_to_see(x: Tensor) -> Tensor:
    """Shares are zero along an axis where all is masked; elsewhere, NaN as softmax gives them, made plain numbers."""
    masked = torch.where(torch.arange(7)[:, None] < 4, x, -torch.inf) + torch.where(
        torch.arange(33) < 30, 0, -torch.inf
    )
    safe = [torch.ops.aten._safe_softmax(masked, axis) for axis in (1, 2)]
    return torch.stack([*safe, (masked.softmax(2) == masked.softmax(2)).float()], 1)


def _filled_parts(x: Tensor) -> Tensor:
    y, number = x * 2, torch.zeros(1, 4, 5)
    y[:, 1] = 0
    y[:, :, 1:3] = x[:, 0, 0, None, None]
    number[:, 2:].fill_(3)
    number[:, :, -1] = True
    number[:, 2:2] = 7
    number[:, :, :0].copy_(x[:1, :, :0])
    truth = x > 0
    truth[:, 3] = 2
    number = number * torch.full_like(x, 2.7, dtype=torch.int64) * torch.full_like(x, 2, dtype=torch.bool)
    truth[:, 0].copy_(x[:, 1] - x[:, 1])
    return torch.cat([y + number + truth.float() * 2, x[:, :0]], 1)


OPERATORS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], list[Tensor]]] = {
    "add": (lambda x, y: x + 2 * y, [(3, 4, 5), (3, 4, 5)], []),
    "broadcast": (lambda x, y: x * y[:, :, None] - 1, [(3, 4, 5), (3, 4)], []),
    "division": (lambda x, w: (1 / (x + 9)) / w + x / 3, [(3, 4)], [torch.rand(4) + 1]),
    "extremes": (lambda x, y: torch.maximum(x, y) + torch.minimum(x, y * 2) + x.clamp(-1, 0.5), [(3, 4), (3, 4)], []),
    "powers": (lambda x: (x.abs() + 1) ** 1.7 + x**2 + (x.abs() + 1).rsqrt() + (x.abs() + 1).log(), [(3, 4)], []),
    "comparisons": (lambda x: (x > 0).float() * 2 + torch.where(x < 1, x, -x), [(3, 40)], []),
    "comparisons of odd numbers": (_comparisons, [(3, 40)], []),
    "truth values": (_truths, [(3, 40)], []),
    "filled parts": (_filled_parts, [(3, 4, 5)], []),
    "numbers written as another type": (_retyped, [(3, 40)], []),
    "a factor of zero": (_without, [(3, 40)], []),
    "masked": (lambda x, m: x.masked_fill(m > 0, -3.0), [(3, 7)], [torch.randn(7)]),
    "prelu": (lambda x, w: F.prelu(x, w), [(2, 3, 5)], [torch.rand(3)]),
    "window sums": (lambda x: x.cumsum(1) + x.cumsum(-1), [(2, 6, 9)], []),
    "im2col": (lambda x: F.unfold(x, (3, 2), (1, 2), (1, 2), (2, 1)), [(2, 3, 9, 8)], []),
    "col2im": (lambda x: F.fold(x, (9, 8), (3, 2), (1, 2), (1, 2), (2, 1)), [(2, 18, 50)], []),
    "gated": (lambda x: F.glu(x, 1), [(2, 6, 5)], []),
    "addcmul": (lambda x, y, w: torch.addcmul(x, y, w, value=2.0), [(2, 5), (2, 5)], [torch.rand(5)]),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3), [(2, 5), (2, 5)], []),
    "matrices": (lambda x, y: x @ y.transpose(1, 2) @ y, [(2, 9, 17), (2, 21, 17)], []),
    "matrix of a constant": (lambda x, w: w @ x, [(2, 9, 17)], [torch.randn(5, 9)]),
    "einsum": (lambda x, y: torch.einsum("bhid,bhjd->bhij", x, y), [(2, 3, 5, 8), (2, 3, 7, 8)], []),
    "attention": (_attention, [(2, 3, 37, 8), (2, 3, 50, 8), (2, 3, 50, 12)], []),
    "attention with a mask": (_attention, [(2, 3, 9, 8)] * 3, [torch.randn(3, 9, 9)]),
    "attention with one head of keys": (_attention, [(2, 3, 37, 8), (2, 1, 50, 8), (2, 1, 50, 12)], []),
    "attention with keys of all rows": (
        lambda q, k, v: _attention(q, k[:, :, :9], v),
        [(2, 3, 7, 8)],
        [torch.randn(1, 1, 11, 8), torch.randn(1, 3, 9, 5)],
    ),
    "attention with a mask of keys": (_attention, [(2, 3, 9, 8)] * 3, [torch.randn(3, 1, 9)]),
    "attention with a bias of queries": (_attention, [(2, 3, 9, 8)] * 3, [torch.randn(1, 9, 1)]),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [(2, 2, 9, 8)] * 3, []),
    "queries that see no key": (
        lambda q, k, v: _attention(q, k, v, torch.ones(9, 50).tril(-3).bool()),
        [(2, 3, 9, 8), (2, 3, 50, 8), (2, 3, 50, 12)],
        [],
    ),
    "scores of nothing": (_nothing_to_see, [(2, 7, 33)], []),
    "softmax": (lambda x: x.softmax(-1) + x.softmax(1) + F.log_softmax(x, 2), [(2, 7, 33)], []),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (33,), w, b), [(2, 7, 33)], [torch.rand(33), torch.randn(33)]),
    "layer norm of two axes": (lambda x: F.layer_norm(x, (7, 33)), [(2, 7, 33)], []),
    "rms norm": (lambda x, w: F.rms_norm(x, (33,), w), [(2, 7, 33)], [torch.rand(33)]),
    "group norm": (lambda x, w, b: F.group_norm(x, 3, w, b), [(2, 6, 5, 7)], [torch.rand(6), torch.randn(6)]),
    "instance norm": (lambda x, w: F.instance_norm(x, weight=w, bias=w), [(2, 4, 5, 7)], [torch.rand(4)]),
    "bounds that are tensors": (lambda x, w: x.clamp(min=w, max=w + 0.5), [(2, 4)], [torch.randn(4)]),
    "group norm of one": (lambda x: F.group_norm(x, 1), [(2, 1, 50)], []),
    "means": (lambda x: x.mean((2, 3)) + x.sum((1, 3))[:, :6] + x.amax((2, 3)), [(2, 6, 7, 5)], []),
    "means of axes apart": (lambda x: x.mean((1, 3)), [(2, 6, 7, 5)], []),
    "variance": (lambda x: x.var(1) + x.std((1,), correction=0) + x.norm(dim=1), [(3, 9, 4)], []),
    "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1) + F.max_pool2d(x, 3, 2, 1, 1), [(2, 3, 9, 11)], []),
    "max pool, dilated, ceil": (lambda x: F.max_pool2d(x, 3, 2, 1, 2, ceil_mode=True), [(2, 3, 10, 12)], []),
    "mean pool": (lambda x: F.avg_pool2d(x, 3, 2, 1), [(2, 3, 9, 11)], []),
    "mean pool without padding": (lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), [(2, 3, 9, 12)], []),
    "pools of wide planes": (
        lambda x: F.max_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        [(2, 2, 61, 150)],
        [],
    ),
    "pools of small planes": (lambda x: F.max_pool2d(x, 5, 1, 2) - F.avg_pool2d(x, 3, 1, 1), [(3, 30, 7, 7)], []),
    "mean pool with a divisor": (lambda x: F.avg_pool2d(x, (2, 3), 2, divisor_override=5), [(2, 3, 9, 31)], []),
    "pool in large steps": (lambda x: F.max_pool2d(x, 2, 3, dilation=4) + F.avg_pool2d(x, 5, 3), [(2, 3, 23, 29)], []),
    "one window": (lambda x: F.adaptive_avg_pool2d(x, 1) * F.max_pool2d(x, 5), [(2, 3, 5, 5)], []),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, (3, 4)), [(2, 3, 10, 11)], []),
    "adaptive max pool": (lambda x: F.adaptive_max_pool2d(x, 1), [(2, 3, 10, 11)], []),
    "pool 1d and 3d": (lambda x: F.avg_pool1d(F.max_pool3d(x[:, None, None], 2, 1, 1)[:, 0, 0], 2), [(2, 5, 8)], []),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2.5), [(2, 3, 5, 6)], []),
    "bilinear": (lambda x: F.interpolate(x, (9, 4), mode="bilinear"), [(2, 3, 5, 6)], []),
    "bilinear corners": (lambda x: F.interpolate(x, (9, 4), mode="bilinear", align_corners=True), [(2, 3, 5, 6)], []),
    "bicubic": (lambda x: F.interpolate(x, (9, 4), mode="bicubic"), [(2, 3, 5, 6)], []),
    "concat": (lambda x, y: torch.cat([x, y, x], 1), [(2, 3, 5), (2, 4, 5)], []),
    "stack": (lambda x, y: torch.stack([x, y], 2), [(2, 3, 5), (2, 3, 5)], []),
    "class token": (lambda x, t: torch.cat([t.expand(x.shape[0], -1, -1), x], 1), [(3, 4, 5)], [torch.randn(1, 1, 5)]),
    "chunks": (lambda x: torch.cat(x.chunk(3, 1)[::-1], 1) + x.split([2, 1, 3], 1)[1], [(2, 6, 5)], []),
    "slices": (lambda x: x[:, 1:-1:2, -3:] + x[:, :2, :1], [(2, 5, 6)], []),
    "permutations": (lambda x: x.permute(0, 3, 1, 2).flatten(2).transpose(1, 2) * 2, [(2, 3, 4, 5)], []),
    "roll": (lambda x: x.roll((-2, 1), (1, 2)), [(2, 5, 6)], []),
    "flip": (lambda x: x.flip(1, 2), [(2, 5, 6)], []),
    "repeat": (lambda x: x.repeat(1, 2, 3), [(2, 3, 2)], []),
    "gather": (lambda x: x[:, torch.tensor([3, 0, 0, 2])], [(2, 4, 3)], []),
    "gather of pairs": (lambda x: x[:, torch.tensor([[1, 0]]), torch.tensor([[2], [0]])], [(2, 4, 3)], []),
    "unfold": (lambda x: x.unfold(2, 3, 2), [(2, 4, 9)], []),
    "pads": (lambda x: F.pad(x, (1, 2, 0, 3), value=7.0) + F.pad(x, (2, 1, 1, 2), mode="reflect"), [(2, 3, 5, 6)], []),
    "cropped": (lambda x: F.pad(x, (-1, 2, -2, 0)), [(2, 3, 5, 6)], []),
    "replicated": (lambda x: F.pad(x, (1, 2, 0, 3), mode="replicate"), [(2, 3, 5, 6)], []),
    "shuffled": (
        lambda x: F.pixel_shuffle(x, 2).sum(1) + F.channel_shuffle(x, 2)[:, 0].repeat(1, 2, 2),
        [(2, 8, 3, 3)],
        [],
    ),
    "weights of each image": (
        lambda *a: _mixed_experts(*a),
        [(3, 4, 9, 8)],
        [torch.randn(4, 2), torch.randn(2, 6 * 4 * 9)],
    ),
    "unshuffled": (lambda x: F.pixel_unshuffle(x, 2), [(2, 3, 4, 6)], []),
    "written in place": (lambda x: _written(x), [(2, 4, 5)], []),
}


def _mixed_experts(x: Tensor, routing: Tensor, experts: Tensor) -> Tensor:
    """A weight for each image of the batch, mixed from those of experts."""
    weight = (x.mean((2, 3)) @ routing).softmax(1) @ experts
    n, channels, height, width = x.shape
    made = F.conv2d(x.reshape(1, n * channels, height, width), weight.view(n * 6, channels, 3, 3), None, 2, 1, 1, n)
    return made.view(n, 6, made.shape[-2], made.shape[-1])


def _written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:3] = x[:, :2] * 2
    y[:, 0] += 1
    return y.relu_()


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_equal_torch_at_other_batch_sizes_than_planned_for(name: str) -> None:
    function, shapes, parameters = OPERATORS[name]
    assert largest_error(Function(function, *parameters), *(torch.randn(shape) for shape in shapes)) < TOLERANCE


def test_empty_outputs_are_refused_when_they_are_planned() -> None:
    with pytest.raises(TraceError, match="without elements"):
        native(Function(lambda x: (x + 1, x[:, :0])), torch.randn(1, 4))


def test_attention_of_grouped_heads_is_refused_when_it_is_planned() -> None:
    grouped = Function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    with pytest.raises(growfx.UnsupportedOperatorError, match="groups of heads"):
        native(grouped, torch.randn(1, 4, 5, 8), *torch.randn(2, 1, 2, 7, 8))


def test_a_nan_reaches_the_outputs_that_active_weights_connect_it_to_and_no_others() -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(40, 30)), torch.randn(1, 40), density=0.2).eval()
    made = native(net, torch.randn(1, 40))
    for rows in (1, 20):
        x = torch.randn(rows, 40)
        x[0, 7], x[-1, 9] = torch.nan, torch.inf
        got = made(x)[0]
        mask = net.masks["0"]
        expected = torch.zeros(rows, 30, dtype=torch.bool)
        expected[0] |= mask[:, 7]
        expected[-1] |= mask[:, 9]
        assert torch.equal(~got.isfinite(), expected)


def test_the_numbers_of_operations_are_those_of_the_library() -> None:
    text = (SOURCE_FOLDER / "operations.h").read_text()
    body = re.sub(r"//.*", "", text[text.index("enum class Op") :].split("{")[1].split("}")[0])
    names = [name.strip().lower() for name in body.split(",") if name.strip()]
    assert tuple(names) == (*OPERATIONS, "count")
