"""Optimizer steps over present edges alone give every bit of the optimizer's own step."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.optimizer import register_optimizer_step_pre_hook

import growfx
from growfx.runtime.train import present_step
from growfx.runtime.train.library import training_status

pytestmark = pytest.mark.skipif(bool(training_status()), reason=training_status() or "the kernels are there")

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, 0.1),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=1e-3, dampening=0.1),
    "nesterov": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True, maximize=True),
    "tensor rate": lambda p: SGD(p, torch.tensor(0.1), momentum=0.9),
    "adam": lambda p: Adam(p, 0.01, weight_decay=1e-3),
    "amsgrad": lambda p: Adam(p, 0.01, amsgrad=True, maximize=True),
    "adamw": lambda p: AdamW(p, 0.01, betas=(0.8, 0.95), weight_decay=0.1),
}


def network() -> growfx.MaskedGraph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 37, 3), nn.ReLU(), nn.Flatten(), nn.Linear(37 * 16, 19))
    net = growfx.wrap(model, torch.randn(1, 3, 6, 6), density=0.1)
    return growfx.use_kernels(net, "sparse")


def train(net: growfx.MaskedGraph, optimizer: Optimizer, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        net(torch.randn(16, 3, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(net: growfx.MaskedGraph, optimizer: Optimizer) -> dict[str, Any]:
    names = {id(p): name for name, p in net.named_parameters()}
    state = {f"{names[id(p)]}.{k}": v for p, entries in optimizer.state.items() for k, v in entries.items()}
    return {**net.state_dict(), **state}


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    before = present_step._index

    def counted(layer: Any) -> Tensor | None:
        found = before(layer)
        counts.append(found is not None)
        return found

    monkeypatch.setattr(present_step, "_index", counted)
    return counts


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_bit_is_that_of_the_optimizers_own_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, found = steps_taken(monkeypatch), []
    for own in (True, False):
        net = network()
        optimizer = OPTIMIZERS[kind](net.parameters())
        with monkeypatch.context() as patch:
            if own:
                patch.setattr(present_step, "_MOST", 0.0)
            counts.clear()
            train(net, optimizer)
            assert any(counts) is not own
        net.verify()
        found.append(state_of(net, optimizer))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]) if isinstance(value, Tensor) else value == found[1][name], name


def test_gradients_are_left_as_they_were() -> None:
    net = network()
    optimizer = SGD(net.parameters(), 0.1)
    net(torch.ones(16, 3, 6, 6)).sum().backward()
    before = {name: p.grad for name, p in net.named_parameters()}
    optimizer.step()
    assert all(p.grad is before[name] for name, p in net.named_parameters())


@pytest.mark.parametrize("kind", ["subclass", "foreach", "another"])
def test_other_optimizers_step_as_ever(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(SGD):
        pass

    net = network()
    makers: dict[str, Make] = {
        "subclass": lambda p: Own(p, 0.1),
        "foreach": lambda p: SGD(p, 0.1, foreach=True),
        "another": lambda p: RMSprop(p, 0.1),
    }
    monkeypatch.setattr(present_step, "_gather", lambda *_: pytest.fail("stepped ahead"))
    before = copy.deepcopy(net.state_dict())
    train(net, makers[kind](net.parameters()), 1)
    assert not torch.equal(net.state_dict()["0.weight"], before["0.weight"])


def test_a_mask_that_changed_before_the_step_is_obeyed() -> None:
    net = network()
    optimizer = SGD(net.parameters(), 0.1, momentum=0.9)
    train(net, optimizer, 2)
    net(torch.ones(16, 3, 6, 6)).sum().backward()
    layer = net.layers["0"]
    layer.mask.copy_(torch.rand(layer.mask.shape) < 0.2)
    optimizer.step()
    net.verify()
    assert not optimizer.state[layer.weight]["momentum_buffer"][~layer.mask].any()


def test_clipped_and_accumulated_gradients_are_stepped() -> None:
    found = []
    for kernels in ("sparse", "dense"):
        net = growfx.use_kernels(network(), kernels)
        optimizer = SGD(net.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            net(torch.ones(16, 3, 6, 6)).square().sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        found.append(net.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


@pytest.mark.parametrize("kind", ["momentum", "nesterov", "adamw"])
def test_state_that_lies_otherwise_in_memory_than_its_weight_is_stepped_edge_by_edge(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for own in (True, False):
        net = network()
        optimizer = OPTIMIZERS[kind](net.parameters())
        with monkeypatch.context() as patch:
            if own:
                patch.setattr(present_step, "_MOST", 0.0)
            train(net, optimizer)
            net.to(memory_format=torch.channels_last)  # the weights, not what the optimizer keeps
            train(net, optimizer)
        found.append(state_of(net, optimizer))
    for name, value in found[0].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[1][name], value)


@pytest.mark.parametrize("everywhere", [True, False])
def test_hooks_around_a_step_see_and_change_the_gradients_it_takes(everywhere: bool) -> None:
    net = network()
    optimizer = SGD(net.parameters(), 0.1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}

    def clear(stepped: Optimizer, args: Any, kwargs: Any) -> None:
        for group in stepped.param_groups:
            for parameter in group["params"]:
                parameter.grad.zero_()

    handle = register_optimizer_step_pre_hook(clear) if everywhere else optimizer.register_step_pre_hook(clear)
    try:
        train(net, optimizer, 1)
    finally:
        handle.remove()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)
