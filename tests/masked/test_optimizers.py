"""Edges outside the mask stay exactly +0.0, and carry no state, under whatever steps the weights."""

import copy
import warnings
from typing import Any

import pytest
import torch
from breadth import some
from method_nets import Small, small_net, train_steps
from timm.optim import Lookahead, create_optimizer_v2
from torch import nn, optim
from torch.nn import functional as F

import growfx
from growfx import methods
from growfx.errors import GrowfxWarning
from growfx.masked import layers as masked_layers
from growfx.masked.optimizers import _KEEPS_ZEROS, forget_state
from growfx.methods.masks import change_masks


class Holding(optim.Optimizer):
    """A wrapper of one's own: an optimizer that holds another, and steps back half of what it does."""

    def __init__(self, inner: optim.Optimizer):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        parameters = [p for group in self.inner.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        loss = self.inner.step(closure)
        for parameter, old in zip(parameters, before, strict=True):
            parameter.lerp_(old, 0.5)
        return loss


class Drifting(optim.SGD):
    """Adds something to every weight, as a step with noise does."""

    def step(self, closure=None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1e-3)
        return loss


def timm(name: str):
    return lambda net: create_optimizer_v2(net, opt=name, lr=0.01, weight_decay=0.01)


def torchs(kind, **options):
    return lambda net: kind(net.parameters(), lr=0.01, **options)


def groups(net):
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    return optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.1}], lr=0.01)


OPTIMIZERS = {
    "sgd": torchs(optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd foreach": torchs(optim.SGD, momentum=0.9, foreach=True),
    "sgd fused": torchs(optim.SGD, momentum=0.9, fused=True, weight_decay=0.1),
    "adam amsgrad": torchs(optim.Adam, amsgrad=True),
    "adam fused": torchs(optim.Adam, fused=True, weight_decay=0.1),
    "adamw foreach": torchs(optim.AdamW, foreach=True, weight_decay=0.1),
    "rmsprop": torchs(optim.RMSprop, momentum=0.9, centered=True, weight_decay=0.1),
    "nadam": torchs(optim.NAdam),
    "radam": torchs(optim.RAdam),
    "adagrad fused": torchs(optim.Adagrad, fused=True),
    "adadelta": torchs(optim.Adadelta),
    "adamax": torchs(optim.Adamax),
    "asgd": torchs(optim.ASGD, weight_decay=0.1),
    "rprop": torchs(optim.Rprop),
    "adafactor": torchs(optim.Adafactor),
    "lbfgs": torchs(optim.LBFGS, max_iter=3),
    "groups": groups,
    **{
        name: timm(name)
        for name in (
            *("lamb", "lion", "lars", "adamp", "sgdp", "adan", "adamwlegacy", "nadamw", "adabelief", "adahessian"),
            *("adopt", "madgrad", "mars", "novograd", "rmsproptf", "adafactorbv", "muon", "adamuon", "cadamw"),
        )
    },
    "lookahead": lambda net: Lookahead(optim.SGD(net.parameters(), lr=0.1, momentum=0.9), k=2),
    "holding": lambda net: Holding(optim.AdamW(net.parameters(), lr=0.01)),
    "drifting": torchs(Drifting, momentum=0.9),
}


def step(net, optimizer, number: int) -> None:
    """One step with clipping, through a closure where the optimizer wants one."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(number))
    targets = images.mean((1, 2, 3)).gt(0).long()

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(net(images), targets)
        value.backward(create_graph=getattr(optimizer, "is_second_order", False))
        return value

    if isinstance(optimizer, optim.LBFGS):
        optimizer.step(loss)
        return
    loss()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()


def innermost(optimizer):
    return vars(optimizer).get("_base_optimizer", vars(optimizer).get("inner", optimizer))


def state_of(optimizer, layer) -> list[torch.Tensor]:
    state = innermost(optimizer).state.get(layer.parameter, {})
    return [v for v in state.values() if isinstance(v, torch.Tensor) and v.shape == layer.mask.shape]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.filterwarnings("ignore:the optimizer's `caution`")
@pytest.mark.parametrize("name", some(OPTIMIZERS, lambda one: one in list(OPTIMIZERS)[::3]))
def test_absent_edges_are_plus_zero_and_without_state_under_steps_decay_clipping_and_updates(name):
    net = small_net().train()
    optimizer = OPTIMIZERS[name](net)
    method = methods.create("rigl", density=0.3, update_every=2, update_until=1.0, drop_fraction=0.5)
    method.attach(net, optimizer, total_steps=9, steps_per_epoch=3)
    start = {k: layer.parameter.detach().clone() for k, layer in net.layers.items()}
    exchanges = 0
    for number in range(8):
        step(net, optimizer, number)
        net.verify()
        before = {k: layer.mask.clone() for k, layer in net.layers.items()}
        exchanges += method.step()
        for k, layer in net.layers.items():
            changed = before[k] ^ layer.mask
            for value in (layer.parameter.detach(), *state_of(optimizer, layer)):
                assert not value[changed].any(), k
                assert not value[~layer.mask].any(), k
                assert torch.isfinite(value).all()
        net.verify()
    assert exchanges == 4
    for k, layer in net.layers.items():
        assert not torch.equal(start[k], layer.parameter)


def test_an_optimizer_whose_groups_begin_with_a_step_count_begins_with_it_again():
    class CountsByGroup(optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1)
            self.defaults["step"] = 0
            for group in self.param_groups:
                group["step"] = 0

        def step(self, closure=None):
            for group in self.param_groups:
                group["step"] += 1
            return super().step(closure)

    net = small_net()
    optimizer = CountsByGroup(net.parameters())
    for number in range(2):
        step(net, optimizer, number)
        forget_state(optimizer, net.layers.values())
        assert [group["step"] for group in optimizer.param_groups] == [0]


def test_every_optimizer_that_is_trusted_to_keep_zeros_is_among_the_tested():
    net = small_net()
    tested = {type(innermost(make(net))) for make in OPTIMIZERS.values()}
    assert {f"{kind.__module__}.{kind.__qualname__}" for kind in tested} >= _KEEPS_ZEROS


@pytest.mark.parametrize("name", ["adamw foreach", "lamb", "muon"])
def test_an_optimizer_made_before_wrapping_is_as_good(name):
    torch.manual_seed(0)
    model = Small()
    optimizer = OPTIMIZERS[name](model)
    net = growfx.wrap(model, torch.randn(2, 3, 8, 8), density=0.3).train()
    for number in range(3):
        step(net, optimizer, number)
        net.verify()
        with torch.no_grad():
            net.layers["wide"].mask.copy_(torch.rand(net.layers["wide"].mask.shape) < 0.3)


def test_a_step_cleans_the_state_even_when_masks_were_changed_by_hand_in_evaluation_mode():
    net = small_net().eval()
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    layer = net.layers["wide"]
    for density in (0.9, 0.2):
        layer.mask.copy_(torch.rand(layer.mask.shape) < density)
        step(net, optimizer, 0)
        assert not optimizer.state[layer.parameter]["momentum_buffer"][~layer.mask].any()
        net.verify()


def test_several_optimizers_each_step_their_own_part():
    net = small_net().train()
    first = optim.SGD(net.shell.stem.parameters(), lr=0.1, momentum=0.9)
    second = create_optimizer_v2([p for k, p in net.named_parameters() if not k.startswith("stem")], "muon", lr=0.01)
    method = methods.create("set", density=0.3, update_every=2, update_until=1.0)
    method.attach(net, first, total_steps=9, steps_per_epoch=3)
    for number in range(8):
        step(net, second, number)
        first.step()
        changed = method.step()
        first.zero_grad()
        assert changed == (number % 2 == 1)
        for optimizer in (first, second):
            for layer in net.layers.values():
                assert all(not value[~layer.mask].any() for value in state_of(optimizer, layer))
        net.verify()


def test_frozen_layers_keep_their_weights_and_the_others_train():
    net = small_net().train()
    net.layers["block"].parameter.requires_grad_(False)
    optimizer = optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    method = methods.create("static", density=0.3)
    method.attach(net, optimizer, total_steps=9, steps_per_epoch=3)
    frozen, free = (net.layers[k].parameter.detach().clone() for k in ("block", "wide"))
    for number in range(3):
        step(net, optimizer, number)
        net.verify()
    assert torch.equal(frozen, net.layers["block"].parameter)
    assert not torch.equal(free, net.layers["wide"].parameter)


@pytest.mark.parametrize(
    "kind", [optim.SGD, optim.LBFGS, lambda p, lr: Holding(optim.SGD(p, lr))], ids=["sgd", "lbfgs", "holding"]
)
def test_a_closure_that_collects_gradients_gives_them_whole_and_the_optimizer_masked_ones(kind):
    net = small_net().train()
    net.set_masks({"wide": torch.rand(net.layers["wide"].mask.shape) < 0.3})
    layer = net.layers["wide"]
    optimizer = kind(net.parameters(), lr=0.01)
    layer.collects_gradient = True
    seen = []
    images = torch.randn(4, 3, 8, 8)

    def loss():
        optimizer.zero_grad()
        value = net(images).square().mean()
        seen.extend(torch.autograd.grad(value, [layer.parameter], retain_graph=True))
        value.backward()
        return value

    optimizer.step(closure=loss)
    assert torch.equal(layer.dense_gradient, seen[-1])
    assert layer.dense_gradient[~layer.mask].any()
    assert not layer.parameter.grad[~layer.mask].any()
    net.verify()


def test_a_closure_that_adds_to_an_accumulated_gradient_gives_the_whole_window():
    """Lightning accumulates so: all batches but the last are outside the step."""
    net = small_net().train()
    net.set_masks({"wide": torch.rand(net.layers["wide"].mask.shape) < 0.3})
    layer = net.layers["wide"]
    optimizer = optim.SGD(net.parameters(), lr=0.01)
    layer.collects_gradient = True
    first, second = torch.randn(2, 4, 3, 8, 8)

    def add(images):
        value = net(images).square().mean()
        value.backward()
        return value

    weight = [layer.parameter]
    whole = sum(torch.autograd.grad(net(images).square().mean(), weight)[0] for images in (first, second))
    add(first)
    optimizer.step(closure=lambda: add(second))
    torch.testing.assert_close(layer.dense_gradient, whole)
    net.verify()


def test_an_edge_dropped_and_grown_again_between_two_steps_has_no_memory_of_before():
    net = small_net().train()
    inner = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, inner, 0)
    layer, mask = net.layers["wide"], net.layers["wide"].mask.clone()
    gone = torch.rand(mask.shape) < 0.5
    for wanted in (mask & ~gone, mask):
        change_masks(net, Holding(inner), {"wide": wanted})
    assert not inner.state[layer.parameter]["momentum_buffer"][gone].any()
    assert inner.state[layer.parameter]["momentum_buffer"][~gone].any()


def test_a_copied_optimizer_and_network_go_on_alike_and_apart():
    net = small_net().train()
    net.set_masks({k: torch.rand(layer.mask.shape) < 0.4 for k, layer in net.layers.items()})
    optimizer = OPTIMIZERS["muon"](net)
    step(net, optimizer, 0)
    other = copy.deepcopy(net)
    twin = OPTIMIZERS["muon"](other)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(1, 4):
        step(net, optimizer, number)
        step(other, twin, number)
    other.verify()
    for mine, its in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


def noisy_gradients(net, _):
    for parameter in net.parameters():
        parameter.grad.add_(torch.randn_like(parameter))


def gradients_of_ones_own(net, _):
    net.zero_grad()
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter).mul_(2)


def ones(state: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.ones_like(v) if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def state_of_another_training(_, optimizer):
    """Loaded after a first step: the masks are no others, the state is."""
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "state": {k: ones(own) for k, own in state["state"].items()}})


def state_set_by_hand(_, optimizer):
    for own in optimizer.state.values():
        for name, value in ones(own).items():
            if isinstance(value, torch.Tensor):
                own[name].copy_(value)


EDITED = ["sgd", "adamw foreach", "adam fused", "muon", "holding"]
EDITS = [noisy_gradients, gradients_of_ones_own, state_of_another_training, state_set_by_hand]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("name", some(EDITED, lambda name: name in ("sgd", "muon")))
def test_what_others_put_outside_the_masks_before_a_step_has_no_effect(edit, name):
    net = small_net().train()
    net.set_masks({k: torch.rand(layer.mask.shape) < 0.4 for k, layer in net.layers.items()})
    optimizer = OPTIMIZERS[name](net)
    for number in range(5):
        F.cross_entropy(net(torch.randn(8, 3, 8, 8)), torch.arange(8) % 4).backward()
        if number in (1, 3):
            edit(net, innermost(optimizer))
        before = {k: layer.parameter.detach().clone() for k, layer in net.layers.items()}
        optimizer.step()
        optimizer.zero_grad()
        net.verify()
        for k, layer in net.layers.items():
            assert not any(value[~layer.mask].any() for value in state_of(optimizer, layer)), k
            assert not torch.equal(layer.parameter, before[k])


def test_gradients_that_nobody_touched_are_masked_once(monkeypatch):
    """A second pass over every gradient would cost as much as the first."""
    passes = []
    monkeypatch.setattr(masked_layers, "mask_gradient", lambda *_: passes.append(1))
    net = small_net().train()
    net.set_masks({k: torch.rand(layer.mask.shape) < 0.4 for k, layer in net.layers.items()})
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        passes.clear()
        net(torch.randn(8, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert passes == []
    net(torch.randn(8, 3, 8, 8)).square().mean().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer.step()
    assert len(passes) == len(net.layers)


# -- state in few bits --------------------------------------------------------------------------------------------


class Rounded(torch.Tensor):
    """State kept as steps of its largest value, as 8-bit optimizers do it: it can be copied from and to, nothing else.

    With `copies` False not even that.
    """

    @staticmethod
    def __new__(cls, codes, scale, copies=True):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale, copies=True):
        self.codes, self.scale, self.copies = codes, scale, copies

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        this, aten = args[0], torch.ops.aten
        if func is aten.detach.default:
            return Rounded(this.codes, this.scale, this.copies)
        if func is aten.copy_.default and all(x.copies for x in args if isinstance(x, Rounded)):
            if isinstance(this, Rounded):
                this.write(args[1])
            else:
                this.copy_(args[1].read())
            return this
        raise NotImplementedError(f"no {func} for state in few bits")

    def read(self):
        return self.codes.float() * self.scale

    def write(self, value):
        self.scale.copy_((value.abs().max() / 127).clamp(min=1e-20))
        self.codes.copy_((value / self.scale).round())


class FewBits(optim.Optimizer):
    """Momentum in few bits."""

    def __init__(self, params, lr=0.1, copies=True):
        super().__init__(params, {"lr": lr})
        self.copies = copies

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if "momentum" not in self.state[p]:
                    codes = torch.zeros(p.shape, dtype=torch.int8)
                    self.state[p]["momentum"] = Rounded(codes, torch.ones(()), self.copies)
                state = self.state[p]["momentum"]
                new = 0.9 * state.read() + p.grad
                state.write(new)
                p.sub_(group["lr"] * new)


@pytest.mark.parametrize("copies", [True, False])
def test_state_in_few_bits_is_cleared_as_far_as_it_can_be_and_weights_stay_masked(copies):
    net = small_net()
    optimizer = FewBits(net.parameters(), copies=copies)
    method = growfx.methods.create("set", density=0.3, update_every=2, update_until=1.0)
    method.attach(net, optimizer, total_steps=12, steps_per_epoch=3)
    changed = []
    for number in range(8):
        changed += train_steps(net, optimizer, method, 1, number)
        net.verify()
        for layer in net.layers.values():
            momentum = optimizer.state[layer.parameter]["momentum"].read()
            assert momentum[layer.mask].any()
            assert not copies or not momentum[~layer.mask].any()
    assert changed.count(True) == 4


class Coded(optim.Optimizer):
    """Momentum as codes, whose levels are kept beside them and are not in the order of codes from zero on."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        levels = (torch.arange(255) - 127) / 127
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["state1"], state["qmap1"] = torch.full(p.shape, 127, dtype=torch.uint8), levels
                new = 0.9 * levels[state["state1"].long()] + 0.1 * p.grad.sign()
                state["state1"].copy_(((new + 1) * 127).round())
                p.sub_(group["lr"] * new)


def test_state_in_codes_is_cleared_to_the_level_of_zero():
    net = small_net()
    optimizer = Coded(net.parameters())
    method = growfx.methods.create("set", density=0.3, update_every=2, update_until=1.0)
    method.attach(net, optimizer, total_steps=12, steps_per_epoch=3)
    for number in range(6):
        before = {name: layer.mask.clone() for name, layer in net.layers.items()}
        changed = any(train_steps(net, optimizer, method, 1, number))
        for name, layer in net.layers.items():
            state = optimizer.state[layer.parameter]
            momentum = state["qmap1"][state["state1"].long()]
            new = (layer.mask != before[name]) if changed else torch.zeros_like(layer.mask)
            assert not momentum[new].any()
            assert momentum[layer.mask].any()


def _told_of_caution(caught: list[warnings.WarningMessage]) -> int:
    return sum(issubclass(w.category, GrowfxWarning) and "absent edges never move" in str(w.message) for w in caught)


@pytest.mark.parametrize(("name", "times"), [("cadamw", 1), ("clion", 1), ("adamw", 0), ("lookahead_cadamw", 1)])
def test_optimizers_whose_step_grows_as_edges_become_fewer_are_warned_of_once(name: str, times: int):
    net = small_net()
    optimizer = create_optimizer_v2(net, opt=name, lr=1e-3)
    method = methods.create("static", density=1.0)
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_steps(net, optimizer, method, 2)
        assert _told_of_caution(caught) == 0  # nothing is absent yet
        change_masks(net, optimizer, {key: torch.rand(layer.mask.shape) < 0.3 for key, layer in net.layers.items()})
        train_steps(net, optimizer, method, 2)
        change_masks(net, optimizer, {key: torch.rand(layer.mask.shape) < 0.2 for key, layer in net.layers.items()})
        train_steps(net, optimizer, method, 2)
    assert _told_of_caution(caught) == times
