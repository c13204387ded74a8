"""Sampling, pooling with positions, and products of several operands, against the map that their rules stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from path_enumeration import assert_follows
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d, deform_conv2d, roi_align, roi_pool

import growfx
from growfx.passes.path_products.products import path_products


class Images(nn.Module):
    """Two convolutions on one stem, an operator on both, a third convolution."""

    def __init__(self, operation: Callable[..., Tensor], width: int = 4) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, width, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(self.operation(self.left(x), self.right(x)))


def check(operation: Callable[..., Tensor], rule: Callable[..., Tensor], width: int = 4, size: int = 6) -> Any:
    """The network with `operation` has the path products of the linear network with `rule`."""
    torch.manual_seed(0)
    net = growfx.wrap(Images(operation, width).eval(), torch.randn(2, 2, size, size))
    assert net.trace_report.faithful

    def total(weights: dict[str, Tensor]) -> Tensor:
        x = F.conv2d(torch.ones(1, 2, size, size).double(), weights["stem"])
        left, right = F.conv2d(x, weights["left"]), F.conv2d(x, weights["right"], padding=1)
        return F.conv2d(rule(left, right), weights["last"])

    return assert_follows(net, total)


def balance(left: Tensor, right: Tensor) -> Tensor:
    """The product of two unbounded values."""
    ratio = right.mean().item() / left.mean().item()
    return left * ratio**0.5 / 2 + right * ratio**-0.5 / 2


def balance_bounded(left: Tensor, gate: Tensor) -> Tensor:
    return left / 2 + gate * (left.mean().item() / gate.mean().item()) / 2


GRID = torch.rand(1, 3, 5, 2, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
OFFSETS = torch.rand(1, 18, 6, 6, generator=torch.Generator().manual_seed(1)) - 0.5
KERNEL = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(2))
BOXES = torch.tensor([[0.0, 0.0, 3.0, 4.0], [1.0, 2.0, 5.0, 5.0]])


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_sampling_at_a_constant_grid_is_executed(mode: str) -> None:
    def at_grid(x: Tensor, other: Tensor, mode: str = mode) -> Tensor:
        return F.grid_sample(x, GRID.to(x).expand(x.shape[0], -1, -1, -1), mode, align_corners=False)

    check(at_grid, lambda left, right: at_grid(left, right, "bilinear" if mode == "bicubic" else mode))


def test_sampling_at_a_grid_from_data_averages_the_image_and_the_coordinates() -> None:
    def rule(left: Tensor, right: Tensor) -> Tensor:
        image = left.mean((2, 3), keepdim=True)
        return balance(
            image, right.unflatten(1, (2, 2)).mean(2).mean(1, keepdim=True) * 0 + right[:, :2].mean(1)[:, None]
        )

    check(lambda left, right: F.grid_sample(left, right[:, :2].permute(0, 2, 3, 1), align_corners=False), rule)


def test_a_bounded_grid_shares_paths_without_adding_magnitude() -> None:
    def operation(left: Tensor, right: Tensor) -> Tensor:
        return F.grid_sample(left, right[:, :2].tanh().permute(0, 2, 3, 1), align_corners=False)

    def rule(left: Tensor, right: Tensor) -> Tensor:
        return balance_bounded(left.mean((2, 3), keepdim=True), right[:, :2].mean(1)[:, None])

    check(operation, rule)


def test_a_constant_image_sampled_by_data_passes_the_grid_alone() -> None:
    table = torch.randn(1, 4, 5, 5)

    def operation(left: Tensor, right: Tensor) -> Tensor:
        grid = right[:, :2].permute(0, 2, 3, 1)
        return F.grid_sample(table.expand(left.shape[0], -1, -1, -1), grid, align_corners=False) + left

    check(operation, lambda left, right: left + right[:, :2].mean(1)[:, None].expand(-1, 4, -1, -1))


# Deformable convolution


def columns(x: Tensor) -> Tensor:
    """The mean of every channel at every tap and place: (batch, channels, taps, height, width)."""
    return x.mean((2, 3))[:, :, None, None, None].expand(-1, -1, 9, *x.shape[2:])


def contract(columns: Tensor) -> Tensor:
    return torch.einsum("bcthw,oct->bohw", columns, KERNEL.double().abs().flatten(2))


def test_a_deformable_convolution_at_constant_offsets_is_executed() -> None:
    def operation(x: Tensor, other: Tensor) -> Tensor:
        return deform_conv2d(x, OFFSETS.to(x).expand(x.shape[0], -1, -1, -1), KERNEL.to(x), padding=1)

    def rule(left: Tensor, right: Tensor) -> Tensor:
        return deform_conv2d(left, OFFSETS.double(), KERNEL.double().abs(), padding=1)

    check(operation, rule)


def test_a_deformable_convolution_averages_image_and_offsets() -> None:
    def rule(left: Tensor, right: Tensor) -> Tensor:
        offsets = right.unflatten(1, (9, 2)).mean(2)[:, None]
        return contract(balance(left.mean((2, 3))[:, :, None, None, None], offsets))

    check(lambda left, right: deform_conv2d(left, right, KERNEL.to(left), padding=1), rule, width=18)


def test_the_mask_of_a_deformable_convolution_is_one_more_factor() -> None:
    def operation(left: Tensor, right: Tensor) -> Tensor:
        offsets = OFFSETS.to(left).expand(left.shape[0], -1, -1, -1)
        return deform_conv2d(left, offsets, KERNEL.to(left), padding=1, mask=right.sigmoid())

    def rule(left: Tensor, right: Tensor) -> Tensor:
        return contract(balance_bounded(left.mean((2, 3))[:, :, None, None, None], right[:, None]))

    check(operation, rule, width=9)


def test_the_module_of_a_deformable_convolution_scores_as_the_function() -> None:
    module = DeformConv2d(4, 4, 3, padding=1, bias=False)
    nn.init.constant_(module.weight, 0.5)

    class Deformed(Images):
        def __init__(self) -> None:
            super().__init__(module, 18)
            self.deformed = module

    torch.manual_seed(0)
    one = path_products(growfx.wrap(Deformed().eval(), torch.randn(2, 2, 6, 6)))
    torch.manual_seed(0)
    function = Images(lambda left, right: deform_conv2d(left, right, torch.full((4, 4, 3, 3), 0.5), padding=1), 18)
    other = path_products(growfx.wrap(function.eval(), torch.randn(2, 2, 6, 6)))
    assert one.log_total == pytest.approx(other.log_total)


# Regions


def test_regions_at_constant_boxes_are_executed() -> None:
    def operation(left: Tensor, right: Tensor) -> Tensor:
        rows = F.pad(BOXES.to(left), (1, 0))
        return torch.ops.torchvision.roi_align(left, rows, 1.0, 2, 3, 2, False)

    check(operation, operation)


@pytest.mark.parametrize("pooling", [roi_align, roi_pool])
def test_regions_at_boxes_from_data_average_the_image_and_the_corners(pooling: Any) -> None:
    def operation(left: Tensor, right: Tensor) -> Tensor:
        rows = F.pad(right.mean((2, 3)), (1, 0))
        return pooling(left, rows, 2)

    def rule(left: Tensor, right: Tensor) -> Tensor:
        corners = right.mean((2, 3)).mean(1).reshape(-1, 1, 1, 1)
        return balance(left.mean((2, 3), keepdim=True), corners).expand(-1, -1, 2, 2)

    check(operation, rule)


# Positions of maxima


def halves(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


@pytest.mark.parametrize("way", ["function", "module", "adaptive"])
def test_pooling_with_positions_averages_and_ends_at_the_positions(way: str) -> None:
    def operation(left: Tensor, right: Tensor) -> Tensor:
        if way == "function":
            pooled, places = F.max_pool2d(left, 2, return_indices=True)
        elif way == "adaptive":
            pooled, places = F.adaptive_max_pool2d(left, 3, return_indices=True)
        else:
            pooled, places = nn.MaxPool2d(2, return_indices=True)(left)
        return pooled + (places >= 0)

    check(operation, lambda left, right: halves(left))


@pytest.mark.parametrize("way", ["function", "module"])
def test_unpooling_spreads_each_element_over_its_window(way: str) -> None:
    class Unpooled(Images):
        def __init__(self) -> None:
            super().__init__(self.both)
            self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

        def both(self, left: Tensor, right: Tensor) -> Tensor:
            pooled, places = self.pool(left)
            return self.unpool(pooled, places) if way == "module" else F.max_unpool2d(pooled, places, 2)

    torch.manual_seed(0)
    net = growfx.wrap(Unpooled().eval(), torch.randn(2, 2, 6, 6))

    def total(weights: dict[str, Tensor]) -> Tensor:
        x = F.conv2d(F.conv2d(torch.ones(1, 2, 6, 6).double(), weights["stem"]), weights["left"])
        return F.conv2d(F.interpolate(halves(x), scale_factor=2.0) / 4, weights["last"])

    assert_follows(net, total)


# Products of several operands

SIGNED = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))


def test_a_product_of_two_activations_and_a_constant_contracts_the_constant_first() -> None:
    def operation(left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("bchw,wv,bchv->bch", left, SIGNED.to(left), right)[..., None].expand(-1, -1, -1, 6)

    def rule(left: Tensor, right: Tensor) -> Tensor:
        first = left @ SIGNED.double().abs()
        return balance(first.mean(3), right.mean(3))[..., None].expand(-1, -1, -1, 6)

    check(operation, rule)


def test_a_product_of_three_activations_goes_from_left_to_right() -> None:
    def operation(left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("bchw,bchv,bcvu->bchu", left, right, left)

    def rule(left: Tensor, right: Tensor) -> Tensor:
        first = balance(left.mean(3, keepdim=True), right)
        return balance(first.mean(3, keepdim=True), left.mean(2, keepdim=True))

    check(operation, rule)


def test_a_repeated_index_means_the_diagonal() -> None:
    def rule(left: Tensor, right: Tensor) -> Tensor:
        return balance(left.diagonal(dim1=2, dim2=3)[:, :, :, None], right)

    check(lambda left, right: torch.einsum("bchh,bchw->bchw", left, right), rule)
