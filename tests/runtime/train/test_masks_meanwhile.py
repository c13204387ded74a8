"""Masks that change between a forward and its backward pass: right gradients, or an error, never a revived edge."""

import pytest
import torch
from torch import Tensor, nn

import growfx
from growfx.runtime.train.library import training_status

built = pytest.mark.skipif(bool(training_status()), reason=training_status() or "the kernels are there")
IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network(kernels: str) -> growfx.MaskedGraph:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    return growfx.use_kernels(growfx.wrap(model, IMAGES[:1], density=0.5).train(), kernels)


def other_masks(net: growfx.MaskedGraph) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(2)
    return {name: torch.rand(layer.mask.shape, generator=noise) < 0.5 for name, layer in net.layers.items()}


@built
@pytest.mark.parametrize("write", ["set_masks", "in place"])
def test_sparse_kernels_give_the_gradients_of_the_forward_at_the_edges_that_are_left(write: str) -> None:
    net = network("sparse")
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(IMAGES).square().sum().backward()
    expected = {name: layer.parameter.grad for name, layer in net.layers.items()}
    optimizer.zero_grad()
    out, before, masks = net(IMAGES).square().sum(), dict(net.masks), other_masks(net)
    before = {name: mask.clone() for name, mask in before.items()}
    if write == "set_masks":
        net.set_masks(masks)
    else:
        for name, mask in masks.items():
            net.layers[name].mask.copy_(mask)
    out.backward()
    for name, layer in net.layers.items():
        found, wanted = layer.parameter.grad, expected[name]
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found, torch.where(before[name] & masks[name], wanted, 0))
    optimizer.step()
    net.verify()


def test_dense_kernels_refuse_the_backward_pass_of_weights_that_edges_have_left() -> None:
    net = network("dense")
    out = net(IMAGES).square().sum()
    net.set_masks(other_masks(net))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_change_of_masks_that_takes_no_weight_away_disturbs_no_backward_pass() -> None:
    net = network("dense")
    net(IMAGES).square().sum().backward()
    expected = {name: layer.parameter.grad for name, layer in net.layers.items()}
    net.zero_grad()
    out = net(IMAGES).square().sum()
    kept = {name: mask.clone() for name, mask in net.masks.items()}
    net.set_masks({name: torch.ones_like(mask) for name, mask in kept.items()})
    out.backward()
    for name, layer in net.layers.items():
        assert layer.parameter.grad is not None
        torch.testing.assert_close(torch.where(kept[name], layer.parameter.grad, 0), expected[name])
