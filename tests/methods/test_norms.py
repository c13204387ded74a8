"""Norm statistics of a network whose weights were put together rather than trained."""

import pytest
import torch
from method_nets import small_net
from torch import nn

import growfx
from growfx.errors import DataError
from growfx.methods.staged.norm_statistics import reestimate_norms


def batches(count: int = 3, size: int = 5):
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(size, 3, 8, 8, generator=generator) * (1 + i), torch.zeros(size).long()) for i in range(count)]


def test_statistics_are_the_plain_averages_over_the_batches_whatever_they_were_and_the_momentum_is():
    net, data = small_net(), batches()
    net.set_masks({"stem": torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.5})
    norm = net.get_submodule("bn")
    norm.running_mean.fill_(7.0)
    norm.running_var.fill_(9.0)
    norm.momentum = 0.3
    reestimate_norms(net, data)
    weight = net.layers["stem"].effective_weight.detach()
    found = [nn.functional.conv2d(images, weight, padding=1) for images, _ in data]
    mean = torch.stack([value.mean((0, 2, 3)) for value in found]).mean(0)
    variance = torch.stack([value.var((0, 2, 3), correction=1) for value in found]).mean(0)
    assert torch.allclose(norm.running_mean, mean, atol=1e-6)
    assert torch.allclose(norm.running_var, variance, rtol=1e-5)
    assert (norm.momentum, int(norm.num_batches_tracked)) == (0.3, 3)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(training):
    net, data = small_net(), batches()
    net.train(training)
    net.get_submodule("block").train(not training)
    modes = {name: module.training for name, module in net.named_modules()}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    reestimate_norms(net, data)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert net.shell.training == training
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_network_without_statistics_reads_no_batch():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    net = growfx.wrap(plain, torch.randn(2, 3, 8, 8))

    def never():
        raise AssertionError("a batch was read")
        yield

    reestimate_norms(net, never())


def test_no_batches_are_refused_and_leave_everything_as_it_was():
    net = small_net()
    net.get_submodule("bn").running_mean.fill_(7.0)
    with pytest.raises(DataError, match="gives no batches to estimate norm statistics from"):
        reestimate_norms(net, [])
    assert bool((net.get_submodule("bn").running_mean == 7.0).all())


def test_an_error_on_the_way_leaves_momentum_and_modes_as_they_were():
    net = small_net().eval()
    with pytest.raises(RuntimeError, match="to have 3 channels"):  # the model's own
        reestimate_norms(net, [*batches(1), (torch.randn(2, 4, 8, 8), None)])
    assert net.get_submodule("bn").momentum == 0.1
    assert not any(module.training for module in net.modules())
