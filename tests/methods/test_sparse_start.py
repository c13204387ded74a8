"""Random starting masks and initial weights that fit them."""

import pytest
import torch
from method_nets import OPTIMIZERS, small_net
from torch import nn

import growfx
from growfx import methods
from growfx.methods.stepwise.sparse_start import scale_to_fan_in


def variance_after(layer, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float(layer(x).var())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(400, 300, bias=False), (200, 400)),
        (nn.Conv2d(40, 80, 3, bias=False), (20, 40, 6, 6)),
        (nn.Conv2d(40, 80, 3, groups=4, bias=False), (40, 40, 6, 6)),
        (nn.ConvTranspose2d(40, 60, 2, stride=2, bias=False), (40, 40, 5, 5)),
    ],
    ids=["linear", "convolution", "grouped", "transposed"],
)
def test_scaled_weights_give_the_variance_of_the_dense_layer(layer, shape):
    torch.manual_seed(0)
    nn.init.normal_(layer.weight)
    x = torch.randn(*shape)
    dense = variance_after(layer, x)
    net = growfx.wrap(nn.Sequential(layer), x[:1])
    made = torch.Generator().manual_seed(1)
    mask = torch.rand(layer.weight.shape, generator=made) < 0.2
    net.set_masks({"0": mask})
    assert variance_after(net, x) < 0.3 * dense
    scale_to_fan_in(net.layers, {"0": mask})
    assert variance_after(net, x) == pytest.approx(dense, rel=0.1)


def test_each_unit_is_scaled_by_its_own_fan_in_and_one_without_edges_not():
    net = growfx.wrap(nn.Sequential(nn.Linear(9, 3, bias=False)), torch.randn(1, 9))
    layer = net.layers["0"]
    before = layer.parameter.detach().clone()
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, :1], mask[1, :4] = True, True
    scale_to_fan_in(net.layers, {"0": mask})
    torch.testing.assert_close(layer.parameter.detach(), before * torch.tensor([[3.0], [1.5], [1.0]]))


@pytest.mark.parametrize("distribution", ["erk", "er", "uniform"])
def test_sparse_aware_changes_weights_and_not_masks(distribution):
    made = {}
    for init in ("dense", "sparse-aware"):
        net = small_net()
        method = methods.create("static", density=0.3, distribution=distribution, init=init, seed=1)
        method.attach(net, OPTIMIZERS["sgd"](net), total_steps=4, steps_per_epoch=2)
        net.verify()
        made[init] = net
    assert made["dense"].mask_digest() == made["sparse-aware"].mask_digest()
    assert made["dense"].nnz == round(0.3 * made["dense"].numel)
    for name, layer in made["dense"].layers.items():
        active = layer.mask.flatten(1).sum(1)
        scale = (layer.mask[0].numel() / active.double()).sqrt().view(-1, *[1] * (layer.mask.ndim - 1))
        expected = torch.where(layer.mask, layer.parameter.detach() * scale.float(), 0)
        torch.testing.assert_close(made["sparse-aware"].layers[name].parameter.detach(), expected)
