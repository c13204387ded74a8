"""Methods in training loops of every kind, against plain torch with the masks multiplied in by hand."""

import copy
import gc
from typing import Any

import pytest
import timm.optim
import torch
from breadth import representative, some
from torch import nn
from torch.nn import functional as F

import growfx
from growfx import methods

GRADIENT = ["gradient-growth", "granet", "rigl", "rigl-sg", "rigl-sm", "snfs"]  # read gradients of absent edges


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        return self.c(x + torch.tanh(self.b(x)))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def quick(name: str, **options: Any) -> methods.Method:
    known = {
        "update_every": 2, "density": 0.4, "seed_density": 0.3, "drop_fraction": 0.5, "epochs_per_round": 1, **options
    }  # fmt: skip
    fields = methods.kind_of(name).__dataclass_fields__
    return methods.create(name, **{key: value for key, value in known.items() if key in fields})


def wrapped() -> tuple[growfx.MaskedGraph, nn.Module]:
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    return growfx.wrap(model, torch.randn(2, 6)).train(), plain


def masked_by_hand(net: growfx.MaskedGraph, plain: nn.Module, before: dict[str, torch.Tensor], optimizers: Any) -> None:
    """Weight, gradient and state of `plain` zero where `net` has no edge, or has another than in the masks `before`."""
    for name, layer in net.layers.items():
        weight, zero = plain.get_submodule(name).weight, ~layer.mask | (layer.mask ^ before[name])
        with torch.no_grad():
            weight[zero] = 0
            if weight.grad is not None:
                weight.grad[zero] = 0
        for optimizer in optimizers:
            for value in optimizer.state.get(weight, {}).values():
                if torch.is_tensor(value) and value.shape == weight.shape:
                    value[zero] = 0


def masks_of(net: growfx.MaskedGraph) -> dict[str, torch.Tensor]:
    return {name: layer.mask.clone() for name, layer in net.layers.items()}


def assert_same(net: growfx.MaskedGraph, plain: nn.Module) -> None:
    net.verify()
    found = net.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def halves(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    named = list(model.named_parameters())
    return [p for name, p in named if name.startswith("a.")], [p for name, p in named if not name.startswith("a.")]


def test_a_dense_phase_forgets_the_state_of_every_optimizer_that_trains_the_network():
    net, plain = wrapped()
    own, theirs = [sgd(part) for part in halves(net)], [sgd(part) for part in halves(plain)]
    method = quick("acdc", cycles=2)
    method.attach(net, own[0], total_steps=12, steps_per_epoch=3)
    dense_phases = 0
    for number in range(12):
        x, y = batch(number)
        F.cross_entropy(net(x), y).backward()
        F.cross_entropy(plain(x), y).backward()
        masked_by_hand(net, plain, masks_of(net), [])
        for optimizer in own + theirs:
            optimizer.step()
        before, nnz = masks_of(net), net.nnz
        method.step()
        if net.nnz > nnz:
            dense_phases += 1
            for optimizer in theirs:
                optimizer.state.clear()
        masked_by_hand(net, plain, before, theirs)
        for optimizer in own + theirs:
            optimizer.zero_grad()
    assert dense_phases
    assert_same(net, plain)


@pytest.mark.parametrize("late", [False, True])
def test_the_step_that_snip_takes_back_leaves_no_trace_in_any_optimizer(late):
    net, _ = wrapped()
    first, second = halves(net)
    optimizers = [sgd(first), torch.optim.AdamW(second, lr=1e-2)]
    for number in range(2 * late):
        F.cross_entropy(net(batch(number)[0]), batch(number)[1]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    method = quick("snip")
    method.attach(net, optimizers[0], total_steps=9, steps_per_epoch=3)
    before = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    x, y = batch(9)
    F.cross_entropy(net(x), y).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert method.step()
    for layer in net.layers.values():  # where edges were removed their state goes too
        for optimizer in optimizers:
            for value in optimizer.state.get(layer.parameter, {}).values():
                assert value.shape != layer.mask.shape or not value[~layer.mask].any()
    after = [optimizer.state_dict() for optimizer in optimizers]
    for old, new in zip(before, after, strict=True):
        assert old["state"].keys() == new["state"].keys()
        for key, values in old["state"].items():
            for name, value in values.items():
                now = new["state"][key][name]
                assert torch.equal(torch.where(now == 0, 0, value), now), name


def test_a_gradient_that_waits_for_its_step_keeps_nothing_of_edges_that_left():
    """A weight whose optimizer comes later: its gradient adds up while edges come and go."""
    net, plain = wrapped()

    def late(model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        weight = model.get_parameter("b.weight")
        return [p for p in model.parameters() if p is not weight], [weight]

    (now, later), (plain_now, plain_later) = late(net), late(plain)
    own, theirs = sgd(now), sgd(plain_now)
    method = quick("set")
    method.attach(net, own, total_steps=12, steps_per_epoch=3)
    masked_by_hand(net, plain, masks_of(net), [])
    for number in range(12):
        if number == 7:
            own.add_param_group({"params": later})
            theirs.add_param_group({"params": plain_later})
        x, y = batch(number)
        F.cross_entropy(net(x), y).backward()
        F.cross_entropy(plain(x), y).backward()
        masked_by_hand(net, plain, masks_of(net), [])
        own.step()
        theirs.step()
        before = masks_of(net)
        method.step()
        masked_by_hand(net, plain, before, [theirs])
        own.zero_grad()
        theirs.zero_grad()
    assert_same(net, plain)


def go_on(net: Any, optimizer: Any, method: Any, first: int, last: int) -> None:
    for number in range(first, last):
        x, y = batch(number)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"sign_in": 1, "initial_density": 0.6}], ids=["plain", "sign-in"])
@pytest.mark.parametrize("name", some([*GRADIENT, "mest", "pwmpr", "channel-growth"], representative))
def test_a_deep_copy_of_network_optimizer_and_method_goes_on_as_the_original(name, options):
    net, _ = wrapped()
    optimizer, method = sgd(net.parameters()), quick(name, **options)
    method.attach(net, optimizer, total_steps=12, steps_per_epoch=3)
    go_on(net, optimizer, method, 0, 5)
    copies = copy.deepcopy((net, optimizer, method))
    go_on(*copies, 5, 12)
    go_on(net, optimizer, method, 5, 12)
    assert copies[0].mask_digest() == net.mask_digest()
    for ours, theirs in zip(net.parameters(), copies[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_copy_of_a_method_counts_the_steps_of_its_own_optimizer():
    net, _ = wrapped()
    optimizer, method = sgd(net.parameters()), quick("set")
    method.attach(net, optimizer, total_steps=12, steps_per_epoch=3)
    go_on(net, optimizer, method, 0, 5)
    copies = copy.deepcopy((net, optimizer, method))
    go_on(net, optimizer, method, 5, 9)
    del net, optimizer, method
    gc.collect()
    before = copies[2].state_dict()["steps"]
    go_on(*copies, 5, 9)
    assert copies[2].state_dict()["steps"] == before + 4


@pytest.mark.parametrize("name", ["rigl", "acdc"])
def test_lbfgs_starts_anew_where_edges_changed_and_not_where_an_update_changed_none(name):
    net, plain = wrapped()
    net, plain = net.double(), plain.double()
    own, theirs = (torch.optim.LBFGS(m.parameters(), lr=0.3, max_iter=3, history_size=3) for m in (net, plain))
    method = quick(name)
    method.attach(net, own, total_steps=12, steps_per_epoch=3)
    masked_by_hand(net, plain, masks_of(net), [])

    def loss_of(model: Any, optimizer: Any, number: int) -> Any:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            x, y = batch(number)
            loss = F.cross_entropy(model(x.double()), y)
            loss.backward()
            if model is plain:
                masked_by_hand(net, plain, masks_of(net), [])
            return loss

        return closure

    unchanged = 0
    for number in range(12):
        for model, optimizer in ((net, own), (plain, theirs)):
            optimizer.step(loss_of(model, optimizer, number))
        before, versions = masks_of(net), [layer.mask._version for layer in net.layers.values()]
        if method.step():
            theirs.state.clear()
        else:
            unchanged += [layer.mask._version for layer in net.layers.values()] != versions
        masked_by_hand(net, plain, before, [])
    assert unchanged  # an update wrote the masks that were there
    assert_same(net, plain)


@pytest.mark.parametrize("name", ["snip", "acdc"])
@pytest.mark.parametrize("opt", ["adan", "lamb"])
def test_steps_that_an_optimizer_counts_by_group_are_taken_back_and_forgotten_with_its_state(name, opt):
    net, _ = wrapped()
    optimizer = timm.optim.create_optimizer_v2(list(net.parameters()), opt=opt, lr=1e-2)
    method = quick(name, cycles=1, warmup=0.2, last_dense=0.3, last_sparse=0.2)
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=3)
    ends = 0
    for number in range(10):
        nnz = net.nnz
        go_on(net, optimizer, method, number, number + 1)
        if (net.nnz < nnz) if name == "snip" else (net.nnz > nnz):
            ends += 1
            assert all("step" not in group for group in optimizer.param_groups)
            assert not optimizer.state or name == "snip"
    assert ends
    assert all(int(group["step"]) < 10 for group in optimizer.param_groups)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("storage", ["dense", "present"])
@pytest.mark.parametrize("name", ["rigl", "snfs"])
def test_gradients_that_a_loop_discards_are_not_read_by_its_method(name, storage, to_none):
    """As after a loss that is not finite: no step, and the next batch."""
    digests = []
    for discards in (False, True):
        net, _ = wrapped()
        growfx.use_kernels(net, "dense", storage=storage)
        optimizer, method = sgd(net.parameters()), quick(name)
        method.attach(net, optimizer, total_steps=12, steps_per_epoch=3)
        for number in range(12):
            if discards and number in (1, 5):
                x, y = batch(50 + number)
                (F.cross_entropy(net(x), y) * 100).backward()
                optimizer.zero_grad(set_to_none=to_none)
            go_on(net, optimizer, method, number, number + 1)
        digests.append(net.mask_digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("storage", ["dense", "present"])
def test_gradients_of_one_window_add_up_where_a_layer_is_used_twice(storage):
    net, _ = wrapped()
    growfx.use_kernels(net, "dense", storage=storage)
    optimizer, method = sgd(net.parameters()), quick("rigl", update_every=1)
    method.attach(net, optimizer, total_steps=12, steps_per_epoch=3)
    layer: Any = net.layers["b"]
    weight = layer.effective_weight.detach().clone().requires_grad_()
    for number in range(3):
        x = torch.tanh(batch(number)[0] @ torch.ones(6, 8))
        layer(torch.tanh(layer(x))).square().sum().backward()
        F.linear(torch.tanh(F.linear(x, weight, layer.bias)), weight, layer.bias).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.dense_gradient, weight.grad)


@pytest.mark.parametrize(
    ("name", "options"), [("rigl-sm", {}), ("snfs", {}), ("set", {"sign_in": 1}), ("pwmpr", {"sign_in": 1})]
)
def test_a_network_may_be_given_another_type_in_the_middle(name, options):
    """From then on it trains as in single precision, but for rounding."""
    nets = []
    for dtype in (torch.float32, torch.float64):
        net, _ = wrapped()
        optimizer, method = sgd(net.parameters()), quick(name, **options)
        method.attach(net, optimizer, total_steps=12, steps_per_epoch=3)
        go_on(net, optimizer, method, 0, 5)
        net.to(dtype)
        for number in range(5, 12):
            x, y = batch(number)
            F.cross_entropy(net(x.to(dtype)), y).backward()
            optimizer.step()
            method.step()
            optimizer.zero_grad()
        net.verify()
        nets.append(net)
    for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=1e-3, atol=1e-5)


def test_a_dense_phase_that_brings_no_edge_back_keeps_the_state_of_the_optimizer():
    """Sparse phases at the density of the given masks drop nothing."""
    torch.manual_seed(0)
    net = growfx.wrap(Net(), torch.randn(2, 6), density=0.4).train()
    optimizer, method = sgd(net.parameters()), quick("acdc", masks="given", density=None, cycles=2)
    method.attach(net, optimizer, total_steps=12, steps_per_epoch=3)
    for number in range(12):
        go_on(net, optimizer, method, number, number + 1)
        assert optimizer.state
