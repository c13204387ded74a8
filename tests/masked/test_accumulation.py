"""Gradient accumulation: a window of batches is one large batch."""

import dataclasses

import pytest
import torch
from method_nets import small_net
from torch import nn
from torch.nn import functional as F
from training_nets import QUICK, fresh_net, loaders

import growfx
from growfx import methods
from growfx.errors import ConfigError
from growfx.methods.stepwise import dynamic
from growfx.methods.stepwise.static import Static
from growfx.options import TrainOptions
from growfx.training.start import train
from growfx.training.step import TrainStep, windows


def plain_net() -> growfx.MaskedGraph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    return growfx.wrap(model, torch.randn(2, 3, 8, 8))


def begin(**options):
    net = plain_net().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    method = methods.create("rigl", density=0.3, update_every=1, update_until=1.0)
    method.attach(net, optimizer, total_steps=9, steps_per_epoch=3)
    return net, optimizer, method, TrainOptions(device="cpu", **options)


IMAGES, TARGETS = torch.randn(12, 3, 8, 8), torch.arange(12) % 4


def parts(*sizes: int):
    return list(zip(IMAGES.split(list(sizes)), TARGETS.split(list(sizes)), strict=True))


@pytest.mark.parametrize("sizes", [(6, 6), (4, 4, 4), (8, 3, 1)])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_window_gives_the_weights_gradients_and_masks_of_one_large_batch(monkeypatch, sizes, clip):
    found = []
    read = dynamic.dense_gradients
    for window in (parts(12), parts(*sizes)):
        net, optimizer, method, options = begin(clip_grad=clip)
        seen: list[dict[str, torch.Tensor]] = []
        monkeypatch.setattr(dynamic, "dense_gradients", lambda *args, seen=seen: seen.append(read(*args)) or seen[-1])
        loss, changed = TrainStep(net, optimizer, method, nn.CrossEntropyLoss(), options)(*window)
        assert changed
        found.append((loss, seen[0], net.state_dict()))
    (loss, gradients, state), (other_loss, other_gradients, other_state) = found
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(gradients, other_gradients)
    torch.testing.assert_close(state, other_state)


def test_in_a_loop_of_ones_own_the_method_reads_the_sum_that_the_optimizer_saw():
    net, optimizer, method, _ = begin()
    whole = torch.autograd.grad(F.cross_entropy(net(IMAGES), TARGETS), [net.layers["0"].parameter])[0]
    for images, targets in parts(4, 4, 4):
        (F.cross_entropy(net(images), targets) / 3).backward()
    optimizer.step()
    torch.testing.assert_close(net.layers["0"].dense_gradient, whole)
    assert not net.layers["0"].parameter.grad[~net.layers["0"].mask].any()
    assert method.step()


def test_batches_without_a_step_of_the_optimizer_are_not_counted():
    """Where a loop tells the method of every batch."""
    net = small_net().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = methods.create("set", density=0.3, update_every=2, update_until=1.0)
    method.attach(net, optimizer, total_steps=9, steps_per_epoch=3)
    changed = []
    for number in range(12):
        net(torch.randn(4, 3, 8, 8)).square().mean().backward()
        if number % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
        changed.append(method.step())
    assert [number for number, moved in enumerate(changed) if moved] == [3, 9]


def test_windows_leave_no_batch_out():
    assert list(windows(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(windows(range(4), 2)) == [[0, 1], [2, 3]]
    assert list(windows([], 2)) == []


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 6), (2, 3), (4, 2), (100, 1)])
def test_steps_of_a_run_are_those_of_the_optimizer(accumulate, steps):
    """Six batches an epoch: the last window of an epoch may be shorter."""
    options = dataclasses.replace(QUICK, accumulate=accumulate)
    clock = []

    class Clocked(Static):
        def attach(self, net, optimizer, *, total_steps, steps_per_epoch):
            clock.append((total_steps, steps_per_epoch))
            super().attach(net, optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

        def begin(self, session):
            clock.append((session.options.epochs * session.steps_per_epoch, session.steps_per_epoch))
            super().begin(session)

    result = train(fresh_net(), *loaders(), method=Clocked(density=0.3), options=options, progress=False)
    assert result.steps == 3 * steps
    assert clock[0] == (3 * steps, steps)
    assert result.dense_equivalent_epochs < 3


def test_a_method_ends_at_its_density_under_accumulation():
    options = dataclasses.replace(QUICK, accumulate=4)
    method = methods.create("gmp", density=0.2, update_every=1)
    result = train(fresh_net(), *loaders(), method=method, options=options, progress=False)
    assert result.nnz == round(0.2 * result.numel)


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_window_without_a_whole_number_of_batches_is_refused(value):
    with pytest.raises(ConfigError, match="`accumulate` = "):
        TrainOptions(accumulate=value)
