"""Mixed precision: what a loss scaler leaves out counts nowhere, and what methods read is unscaled."""

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from method_nets import small_net
from torch import nn
from torch.nn import functional as F
from training_nets import QUICK, final_state, fresh_net, interrupt_at, loaders

import growfx
from growfx import methods
from growfx.errors import GrowfxError
from growfx.options import TrainOptions
from growfx.training.recipe import seed_globally
from growfx.training.start import train
from growfx.training.step import TrainStep


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(number))
    return images, images.mean((1, 2, 3)).gt(0).long()


def begin(make: Any = torch.optim.SGD, **options):
    net = small_net().train()
    optimizer = make(net.parameters(), lr=0.05)
    chosen = {"density": 0.3, "update_every": 2, "update_until": 1.0, **options}
    method = methods.create("rigl", **chosen)
    method.attach(net, optimizer, total_steps=9, steps_per_epoch=3)
    return net, optimizer, method


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("zero_first", [False, True])
def test_a_step_that_the_scaler_leaves_out_is_not_counted_in_a_loop_of_ones_own(fused, zero_first):
    net, optimizer, method = begin(lambda p, lr: torch.optim.Adam(p, lr=lr, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    changed, overflows = [], (0, 1, 4, 6)
    for number in range(8):
        images, targets = batch(number)
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(net(images), targets)
        before = net.mask_digest()
        scaler.scale(loss * (torch.inf if number in overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if zero_first and number > 1:  # before the first step nothing but its gradients tells that it was left out
            optimizer.zero_grad()
        changed.append(method.step())
        optimizer.zero_grad()
        assert changed[-1] or net.mask_digest() == before
        assert all(torch.isfinite(p).all() for p in net.parameters())
        net.verify()
    assert [number for number, moved in enumerate(changed) if moved] == [3, 7]
    assert method.state_dict()["steps"] == 4


def test_state_that_a_fused_step_left_unwritten_is_clean_outside_the_masks():
    """torch gives a momentum of whatever was in memory to a first step that its scaler leaves out."""
    net, optimizer, _ = begin(lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(net(batch(0)[0]).sum() * torch.inf).backward()
    scaler.step(optimizer)
    for layer in net.layers.values():
        assert not optimizer.state[layer.parameter]["momentum_buffer"][~layer.mask].any()
    net.verify()


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradients_a_method_reads_are_unscaled(fused):
    seen = []
    for scale in (1.0, 1024.0):
        net, optimizer, method = begin(lambda p, lr: torch.optim.SGD(p, lr=lr, fused=fused), update_every=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        assert method.needs_dense_gradient
        images, targets = batch(0)
        scaler.scale(F.cross_entropy(net(images), targets)).backward()
        scaler.step(optimizer)
        seen.append({k: layer.dense_gradient for k, layer in net.layers.items()})
    for k, gradient in seen[0].items():
        assert gradient.any()
        torch.testing.assert_close(gradient, seen[1][k])


class Overflowing(nn.Module):
    """A loss whose gradients are not finite while a scale is above `limit`."""

    def __init__(self, limit: float):
        super().__init__()
        self.limit = limit

    def forward(self, output, targets):
        output.register_hook(lambda grad: grad if float(grad.abs().sum()) < self.limit else grad * torch.inf)
        return F.cross_entropy(output, targets)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_run_repeats_what_overflows_at_a_smaller_scale_and_counts_it_once(clip):
    net, optimizer, method = begin()
    options = TrainOptions(amp="fp16", clip_grad=clip, device="cpu")
    step = TrainStep(net, optimizer, method, Overflowing(64.0), options)
    changed = []
    for number in range(4):
        before = [p.detach().clone() for p in net.parameters()]
        loss, moved = step(batch(number))
        changed.append(moved)
        assert torch.isfinite(loss)
        assert any(not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
        net.verify()
    assert changed == [False, True, False, True]
    assert method.state_dict()["steps"] == 4
    assert 0 < step.state_dict()["scale"] < 65536


class Stateful(nn.Module):
    """Everything that a forward in training moves: norm statistics, a buffer made anew, torch's and numpy's numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().float().mean(0)
            x = x * float(1 + np.random.rand()) * (1 + random.random())  # noqa: NPY002
        return self.head(self.drop(x))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_repeated_step_is_the_one_that_a_smaller_scale_makes_at_once(accumulate):
    def trained(first_scale: float):
        torch.manual_seed(0)
        net = growfx.wrap(Stateful(), torch.randn(2, 3, 8, 8)).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        method = methods.create("static", density=0.5)
        method.attach(net, optimizer, total_steps=9, steps_per_epoch=3)
        step = TrainStep(net, optimizer, method, Overflowing(8.0), TrainOptions(amp="fp16", device="cpu"))
        step.load_state_dict({**step.state_dict(), "scale": first_scale})
        seed_globally(3, 0)
        for number in range(3):
            step(*(batch(10 * number + part) for part in range(accumulate)))
        return net.state_dict(), step.state_dict()["scale"], (torch.rand(1), np.random.rand(), random.random())  # noqa: NPY002

    repeated, scale, numbers = trained(2.0**16)
    at_once, own_scale, own_numbers = trained(scale)
    assert own_scale == scale < 2.0**14
    assert repeated["norm.num_batches_tracked"] == 3 * accumulate
    assert repeated["mean"].any()
    assert all(torch.equal(repeated[name], value) for name, value in at_once.items())
    assert numbers == own_numbers


def test_gradients_that_overflow_at_every_scale_end_the_run():
    net, optimizer, method = begin()
    step = TrainStep(net, optimizer, method, Overflowing(0.0), TrainOptions(amp="fp16", device="cpu"))
    with pytest.raises(GrowfxError, match="set `amp` to `bf16`"):
        step(batch(0))


def test_a_loss_that_is_not_finite_itself_is_not_repeated():
    net, optimizer, method = begin()

    class Infinite(nn.Module):
        calls = 0

        def forward(self, output, targets):
            Infinite.calls += 1
            return output.sum() * torch.inf

    step = TrainStep(net, optimizer, method, Infinite(), TrainOptions(amp="fp16", device="cpu"))
    loss, moved = step(batch(0))
    assert not torch.isfinite(loss)
    assert (moved, Infinite.calls) == (False, 1)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_is_close_to_full_precision_and_keeps_weights_and_masks_whole(amp):
    outcomes = []
    for precision in ("none", amp):
        net, optimizer, method = begin()
        step = TrainStep(net, optimizer, method, nn.CrossEntropyLoss(), TrainOptions(amp=precision, device="cpu"))
        loss, _ = step(batch(0))
        outcomes.append((float(loss), net.layers["wide"].parameter.detach().clone()))
        assert {p.dtype for p in net.parameters()} == {torch.float32}
    (loss, weight), (half_loss, half_weight) = outcomes
    assert half_loss != loss
    assert half_loss == pytest.approx(loss, rel=0.02)
    torch.testing.assert_close(half_weight, weight, atol=1e-3, rtol=0.05)


def test_clipping_leaves_the_gradients_that_methods_read_and_ignores_absent_edges():
    """The same step with and without absent edges collected: the norm that is clipped is of present edges alone."""
    weights, gradients = [], []
    for collects in (False, True):
        net, optimizer, method = begin(update_every=1 if collects else 5)
        step = TrainStep(net, optimizer, method, nn.CrossEntropyLoss(), TrainOptions(clip_grad=0.01, device="cpu"))
        step.method = methods.create("static", density=1.0)
        other = small_net()
        step.method.attach(other, torch.optim.SGD(other.parameters(), lr=0.05), total_steps=1, steps_per_epoch=1)
        step(batch(0))
        weights.append(net.layers["stem"].parameter.detach().clone())
        gradients.append(net.layers["stem"].dense_gradient)
    torch.testing.assert_close(weights[0], weights[1])
    assert gradients[0] is None
    assert float(gradients[1].norm()) > 0.01


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_run_in_half_precision_learns_and_resumes_exactly(tmp_path, monkeypatch, amp):
    options = dataclasses.replace(QUICK, amp=amp, clip_grad=1.0)

    def run(folder, **how):
        method = methods.create("rigl", density=0.3, update_every=4)
        return train(fresh_net(), *loaders(), method=method, options=options, out=folder, progress=False, **how)

    whole = run(tmp_path / "whole")
    assert whole.nnz == round(0.3 * whole.numel)
    assert whole.val_accuracy > 0.5
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch=1, step=2)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    again = run(tmp_path / "cut", resume=True)
    assert again.mask_digest == whole.mask_digest
    states = [final_state(tmp_path / name) for name in ("whole", "cut")]
    assert states[0]["step"] == states[1]["step"]
    for key, value in states[0]["net"].items():
        assert torch.equal(value, states[1]["net"][key]), key
