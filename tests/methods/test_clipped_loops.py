"""What a loop does to gradients between backward and the optimizer's step: absent edges do not count, and follow."""

import copy
import gc
import weakref

import pytest
import torch
from test_loops import GRADIENT, Net, batch, quick, sgd, wrapped
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

import growfx
from growfx.methods.masks import change_masks, collect_gradients, dense_gradients

STORAGES = ["dense", "present"]


def begin(name, storage, **options):
    net, _ = wrapped()
    growfx.use_kernels(net, "dense", storage=storage)
    optimizer, method = sgd(net.parameters()), quick(name, **options)
    method.attach(net, optimizer, total_steps=12, steps_per_epoch=3)
    return net, optimizer, method


def collecting(storage="dense", density=0.4):
    torch.manual_seed(0)
    net = growfx.wrap(Net(), torch.randn(2, 6), density=density).train()
    growfx.use_kernels(net, "dense", storage=storage)
    collect_gradients(net.layers.values(), True)
    return net, sgd(net.parameters())


def whole_gradients(net, *numbers, scale=1.0):
    """Of plain copies of the layers, for the mean loss of some batches each."""
    plain = Net()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.endswith("mask")})
    for number in numbers:
        x, y = batch(number)
        (F.cross_entropy(plain(x), y) * scale).backward()
    return plain


def norm_of_present(net, plain):
    own = {f"{name}.weight": layer.mask for name, layer in net.layers.items()}
    parts = [p.grad[own[name]] if name in own else p.grad for name, p in plain.named_parameters()]
    return torch.cat([part.flatten() for part in parts]).norm()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", GRADIENT)
def test_clipping_counts_present_edges_alone(name, storage):
    """And changes no choice of a method: all layers' gradients are clipped by one factor."""
    nets = []
    for by_hand in (False, True):
        net, optimizer, method = begin(name, storage)
        for number in range(12):
            x, y = batch(number)
            expected = norm_of_present(net, whole_gradients(net, number))
            F.cross_entropy(net(x), y).backward()
            if by_hand:
                for layer in net.layers.values():
                    if layer.collects_gradient:
                        layer.take_dense_gradient()
            found = clip_grad_norm_(net.parameters(), 0.1)
            torch.testing.assert_close(found, expected)
            optimizer.step()
            method.step()
            optimizer.zero_grad()
        net.verify()
        nets.append(net)
    if name != "snfs":  # its running mean is of gradients as they were clipped
        assert nets[0].mask_digest() == nets[1].mask_digest()
        for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_backward_leaves_a_masked_gradient_and_the_step_finds_the_whole():
    net, optimizer = collecting()
    expected = whole_gradients(net, 0)
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    for layer in net.layers.values():
        assert not layer.parameter.grad[~layer.mask].any()
    optimizer.step()
    for name, layer in net.layers.items():
        assert layer.dense_gradient[~layer.mask].any()
        torch.testing.assert_close(layer.dense_gradient, expected.get_submodule(name).weight.grad)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("between", ["scaled", "clipped", "nothing", "zeroed", "discarded", "step"])
def test_gradients_of_absent_edges_follow_what_is_done_to_those_of_present_ones(storage, between):
    """Two batches of one window, and what a loop may do in the middle of it."""
    net, optimizer = collecting(storage)
    expected = whole_gradients(net, 0)
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    gradients = [p.grad for p in net.parameters()]
    theirs = [p.grad for p in expected.parameters()]
    if between == "scaled":
        for gradient in gradients + theirs:
            gradient.mul_(1 / 1024)
    elif between == "clipped":
        factor = 0.01 / norm_of_present(net, expected)
        clip_grad_norm_(net.parameters(), 0.01)
        for gradient in theirs:
            gradient.mul_(factor)
    elif between in ("zeroed", "discarded"):
        optimizer.zero_grad(set_to_none=between == "discarded")
        expected.zero_grad()
    elif between == "step":  # the window goes on under another optimizer's step
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()
    x, y = batch(1)
    F.cross_entropy(net(x), y).backward()
    F.cross_entropy(expected(x), y).backward()
    optimizer.step()
    for name, gradient in dense_gradients(net, net.layers).items():
        torch.testing.assert_close(gradient, expected.get_submodule(name).weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_loss_scaler_that_is_not_fused_unscales_what_methods_read(storage):
    """With clipping, as recipes have it: after `unscale_`."""
    seen = []
    for scale in (1.0, 1024.0, 2.0**100, 2.0**-100):
        net, optimizer = collecting(storage)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        x, y = batch(0)
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
        seen.append({k: layer.dense_gradient for k, layer in net.layers.items()})
    for k, gradient in seen[0].items():
        assert gradient.any()
        for other in seen[1:]:
            torch.testing.assert_close(gradient, other[k])


def test_a_gradient_of_absent_edges_that_is_not_finite_is_seen_by_the_loss_scaler():
    net, optimizer = collecting()
    layer = net.layers["b"]
    spot = tuple((~layer.mask).nonzero()[0])
    before = [p.detach().clone() for p in net.parameters()]

    def overflow(gradient):
        gradient = gradient.clone()
        gradient[spot] = torch.inf
        return gradient

    layer.parameter.register_hook(overflow)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = batch(0)
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(map(torch.equal, before, net.parameters()))


def test_masks_that_change_before_the_step_lose_no_gradient_of_absent_edges():
    net, optimizer = collecting()
    expected = whole_gradients(net, 0)
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    masks = {name: torch.zeros_like(layer.mask) for name, layer in net.layers.items()}
    absent = {name: ~layer.mask for name, layer in net.layers.items()}
    change_masks(net, optimizer, masks)
    for name, gradient in dense_gradients(net, net.layers).items():
        wanted = expected.get_submodule(name).weight.grad[absent[name]]
        torch.testing.assert_close(gradient[absent[name]], wanted)


@pytest.mark.parametrize("empty", ["no edges", "no gradient"])
def test_a_layer_without_present_gradients_is_read_all_the_same(empty):
    net, optimizer = collecting()
    if empty == "no edges":
        net.set_masks({"b": torch.zeros_like(net.layers["b"].mask)})
    expected = whole_gradients(net, 0)
    x, y = batch(0)
    (F.cross_entropy(net(x), y) * (0.0 if empty == "no gradient" else 1.0)).backward()
    optimizer.step()
    for name, gradient in dense_gradients(net, net.layers).items():
        wanted = expected.get_parameter(f"{name}.weight").grad
        assert wanted is not None
        wanted = wanted * (0.0 if empty == "no gradient" else 1.0)
        torch.testing.assert_close(gradient, wanted)
    net.verify()


def test_gradients_that_are_asked_for_by_name_are_whole_and_add_to_nothing():
    """`torch.autograd.grad` leaves `.grad` alone."""
    net, optimizer = collecting()
    expected = whole_gradients(net, 0)
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    weight = net.layers["b"].parameter
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), y), [weight])
    torch.testing.assert_close(gradient, expected.b.weight.grad)
    optimizer.step()
    for name, gradient in dense_gradients(net, net.layers).items():
        torch.testing.assert_close(gradient, expected.get_submodule(name).weight.grad)


def test_optimizers_that_step_within_the_backward_pass_give_methods_the_whole_gradient():
    net, _ = collecting()
    expected = whole_gradients(net, 0)
    each = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}

    def step(parameter):
        each[parameter].step()
        each[parameter].zero_grad()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    for name, gradient in dense_gradients(net, net.layers).items():
        torch.testing.assert_close(gradient, expected.get_submodule(name).weight.grad)
    net.verify()


def test_copies_and_nets_that_collect_no_more_watch_nothing():
    net, _ = collecting()
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    twin = copy.deepcopy(net)
    collect_gradients(net.layers.values(), False)
    for one in (net, twin):
        for layer in one.layers.values():
            assert not layer.parameter._backward_hooks
            assert not layer.parameter._post_accumulate_grad_hooks
            assert layer.dense_gradient is None


class Reader(Net):
    """It reads a weight without calling the layer, and uses it twice."""

    def forward(self, x):
        x = torch.tanh(self.a(x))
        return self.c(x + torch.tanh(F.linear(F.linear(x, self.b.weight), self.b.weight, self.b.bias)))


def test_a_weight_that_the_model_reads_itself_leaves_a_masked_gradient_too():
    torch.manual_seed(0)
    net = growfx.wrap(Reader(), torch.randn(2, 6), density=0.4).train()
    collect_gradients(net.layers.values(), True)
    plain = Reader()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.endswith("mask")})
    x, y = batch(0)
    for model in (net, plain):
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(clip_grad_norm_(net.parameters(), 1e9), norm_of_present(net, plain))
    sgd(net.parameters()).step()
    for name, gradient in dense_gradients(net, net.layers).items():
        torch.testing.assert_close(gradient, plain.get_submodule(name).weight.grad)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_backward_passes_of_recomputed_forwards_add_up():
    """Activation checkpoints run backward passes within one."""

    class Checkpointed(Net):
        def forward(self, x):
            x = torch.tanh(self.a(x))
            return self.c(x + checkpoint(lambda h: torch.tanh(self.b(h)), x, use_reentrant=True))

    torch.manual_seed(0)
    net = growfx.wrap(Checkpointed(), torch.randn(2, 6), density=0.4).train()
    collect_gradients(net.layers.values(), True)
    expected = whole_gradients(net, 0, 1)
    for number in (0, 1):
        x, y = batch(number)
        F.cross_entropy(net(x), y).backward()
    torch.testing.assert_close(clip_grad_norm_(net.parameters(), 1e9), norm_of_present(net, expected))
    sgd(net.parameters()).step()
    for name, gradient in dense_gradients(net, net.layers).items():
        torch.testing.assert_close(gradient, expected.get_submodule(name).weight.grad)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_batch_without_a_finite_loss_that_is_left_out_leaves_nothing_behind(set_to_none):
    net, optimizer = collecting()
    layer = net.layers["b"]
    spot = tuple(layer.mask.nonzero()[0])

    def fail(gradient):
        gradient = gradient.clone()
        gradient[spot] = torch.nan
        return gradient

    hook = layer.parameter.register_hook(fail)
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    hook.remove()
    optimizer.zero_grad(set_to_none=set_to_none)
    expected = whole_gradients(net, 1)
    F.cross_entropy(net(batch(1)[0]), batch(1)[1]).backward()
    optimizer.step()
    for name, gradient in dense_gradients(net, net.layers).items():
        torch.testing.assert_close(gradient, expected.get_submodule(name).weight.grad)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_window_may_end_with_a_backward_pass_that_keeps_a_graph():
    net, optimizer = collecting()
    expected = whole_gradients(net, 0, 1)
    for number in (0, 1):
        x, y = batch(number)
        F.cross_entropy(net(x), y).backward(create_graph=number == 1)
    optimizer.step()
    for name, gradient in dense_gradients(net, net.layers).items():
        torch.testing.assert_close(gradient, expected.get_submodule(name).weight.grad)
    for parameter in net.parameters():
        parameter.grad = None  # a graph of its own


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_of_no_weights_has_no_gradient_to_watch():
    net = growfx.wrap(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3), nn.Linear(3, 2)), torch.randn(2, 4), density=0.5)
    collect_gradients(net.train().layers.values(), True)
    net(torch.randn(2, 4)).sum().backward()
    sgd(net.parameters()).step()
    assert {name: g.shape for name, g in dense_gradients(net, net.layers).items()} == {
        name: layer.mask.shape for name, layer in net.layers.items()
    }


def test_a_parameter_that_another_one_replaced_is_watched_no_longer():
    net, _ = collecting()
    layer = net.layers["b"]
    old = layer.parameter
    F.cross_entropy(net(batch(1)[0]), batch(1)[1]).backward()
    layer.weight = nn.Parameter(old.detach().clone())
    net.zero_grad()
    expected = whole_gradients(net, 0)
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    sgd(net.parameters()).step()
    torch.testing.assert_close(dense_gradients(net, net.layers)["b"], expected.b.weight.grad)
    old.grad = None
    old.sum().backward()
    assert old.grad.all()


def test_weights_of_a_network_that_is_gone_are_freed_while_they_were_watched():
    net, _ = collecting()
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    weight = weakref.ref(net.layers["b"].parameter)
    del net, _
    gc.collect()
    assert weight() is None


def test_gradients_by_function_transforms_are_whole_as_those_of_backward():
    net, _ = collecting()
    expected = whole_gradients(net, 0)
    x, y = batch(0)
    values = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(values, x, y):
        return F.cross_entropy(torch.func.functional_call(net, values, (x,)), y)

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, x.unsqueeze(1), y.unsqueeze(1))
    whole = torch.func.grad(loss)(values, x, y)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad)
        torch.testing.assert_close(rows[name].mean(0), parameter.grad)
