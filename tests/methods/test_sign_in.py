"""Weights trained as products: the formula, resets, masks that change, state, refusals."""

import copy
import dataclasses

import pytest
import torch
from breadth import representative, some
from error_facts import facts
from method_nets import small_net, train_steps
from torch.nn import functional as F

import growfx
from growfx import methods
from growfx.errors import ConfigError
from growfx.methods.sign_in import SignIn
from growfx.runtime.train.library import training_status

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
}
SPARSE = ("gradient-growth", "grow-prune", "mest", "phew", "pwmpr", "rigl", "set", "small-dense", "static", "synflow")


def sparse_net(seed: int = 0, density: float = 0.3) -> growfx.MaskedGraph:
    net = small_net(seed)
    draws = torch.Generator().manual_seed(7)
    net.set_masks({n: torch.rand(x.mask.shape, generator=draws) < density for n, x in net.layers.items()})
    return net


def batch(number: int):
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(number))
    return images, images.mean((1, 2, 3)).gt(0).long()


def by_hand(optimizer_name: str, steps: int, period: int) -> dict[str, torch.Tensor]:
    """The reparametrised network, built by autograd: every weight is made of two leaves at each step."""
    net = sparse_net()
    model = growfx.unwrap(copy.deepcopy(net))
    masks = {f"{n}.weight": x.mask.clone() for n, x in net.layers.items()}
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    inner = {n: values[n].clone().requires_grad_() for n in values}
    scale = {n: torch.ones_like(values[n]).requires_grad_() for n in masks}
    optimizer = OPTIMIZERS[optimizer_name](list(inner.values()))
    optimizer.add_param_group({"params": list(scale.values()), "weight_decay": 0.0})
    model.train()
    for number in range(steps):
        images, classes = batch(number)
        made = {n: torch.where(masks[n], scale[n] * w, 0.0) if n in masks else w for n, w in inner.items()}
        F.cross_entropy(torch.func.functional_call(model, made, (images,)), classes).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (number + 1) % period == 0:
            with torch.no_grad():
                for n in masks:
                    inner[n].mul_(scale[n])
                    scale[n].fill_(1.0)
    return {n: (scale[n] * inner[n] * masks[n] if n in masks else inner[n]).detach() for n in inner}


@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
def test_training_is_that_of_the_product_of_two_leaves(optimizer_name):
    expected = by_hand(optimizer_name, 7, 3)
    net = sparse_net()
    optimizer = OPTIMIZERS[optimizer_name](net.parameters())
    method = methods.create("static", masks="given", sign_in=1)
    method.attach(net, optimizer, total_steps=7, steps_per_epoch=3)
    train_steps(net, optimizer, method, 7)
    found = growfx.unwrap(net).state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5), name


def test_it_is_another_training_than_that_of_plain_weights_and_zero_is_that():
    ends = {}
    for periods in (0, 1, 2):
        net = sparse_net()
        optimizer = OPTIMIZERS["sgd"](net.parameters())
        method = methods.create("static", masks="given", sign_in=periods)
        method.attach(net, optimizer, total_steps=6, steps_per_epoch=3)
        assert len(optimizer.param_groups) == (2 if periods else 1)
        train_steps(net, optimizer, method, 6)
        ends[periods] = net.layers["block"].parameter.detach().clone()
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


@pytest.mark.parametrize("name", some(SPARSE, representative))
def test_every_method_that_starts_sparse_trains_by_it_and_resumes_exactly(name):
    options = {"sign_in": 1} | ({"update_every": 2} if name in ("mest", "rigl", "set") else {})
    options |= {"seed_density": 0.2, "epochs_per_round": 1} if "grow" in name or name == "pwmpr" else {"density": 0.5}

    def attached(seed):
        net = small_net(seed)
        optimizer = OPTIMIZERS["sgd"](net.parameters())
        method = methods.create(name, **options)
        method.attach(net, optimizer, total_steps=8, steps_per_epoch=3)
        return net, optimizer, method

    ends = []
    for cut in (False, True):
        parts = attached(0)
        for number in range(2):
            train_steps(*parts, 4, 4 * number)
            if cut and not number:
                states = [copy.deepcopy(part.state_dict()) for part in parts]
                parts = attached(3)
                for part, state in zip(parts, states, strict=True):
                    part.load_state_dict(state)
        ends.append(parts[0].state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert all(torch.isfinite(value).all() for value in ends[0].values() if value.is_floating_point())


def test_the_network_and_its_gradient_never_hold_the_factors():
    net = sparse_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    sign_in = SignIn(net, optimizer, 100)
    plain = set(net.state_dict())
    for number in range(4):
        images, classes = batch(number)
        F.cross_entropy(net(images), classes).backward()
        before = {n: x.parameter.grad.clone() for n, x in net.layers.items()}
        optimizer.step()
        for name, layer in net.layers.items():
            assert torch.equal(layer.parameter.grad, torch.where(layer.mask, before[name], 0.0))
            state = sign_in.state_dict()["factors"][name]
            assert torch.equal(layer.parameter.detach()[layer.mask], state["scale"] * state["inner"])
            assert not layer.parameter.detach()[~layer.mask].any()
        optimizer.zero_grad()
    assert any((value["scale"] != 1).any() for value in sign_in.state_dict()["factors"].values())
    assert set(net.state_dict()) == plain


def test_edges_keep_their_scale_and_momentum_when_masks_change_and_new_ones_start_at_one():
    net = sparse_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    sign_in = SignIn(net, optimizer, 100)
    layer = net.layers["block"]
    for number in range(3):
        images, classes = batch(number)
        F.cross_entropy(net(images), classes).backward()
        optimizer.step()
        optimizer.zero_grad()
    old, factors = layer.mask.clone(), sign_in._factors["block"]
    scales = torch.zeros(old.shape)
    scales[old] = factors.scale.detach()
    momenta = torch.zeros(old.shape)
    momenta[old] = optimizer.state[factors.scale]["momentum_buffer"]
    new = old.clone()
    new.view(-1)[:60] = ~new.view(-1)[:60]
    net.set_masks({"block": new})
    with torch.no_grad():
        layer.parameter[new] += 0.0
    sign_in._follow(factors, optimizer)
    stay = old & new
    now = torch.zeros(old.shape)
    now[new] = factors.scale.detach()
    assert torch.equal(now[stay], scales[stay])
    assert (now[new & ~old] == 1).all()
    kept = torch.zeros(old.shape)
    kept[new] = optimizer.state[factors.scale]["momentum_buffer"]
    assert torch.equal(kept[stay], momenta[stay])
    assert not kept[new & ~old].any()


def test_scales_have_the_learning_rate_of_their_weights_also_after_a_state_was_loaded():
    net = sparse_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    sign_in = SignIn(net, optimizer, 100)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    before = net.layers["block"].parameter.detach().clone()
    images, classes = batch(0)
    F.cross_entropy(net(images), classes).backward()
    optimizer.step()
    assert torch.equal(net.layers["block"].parameter.detach(), before)
    assert all((value["scale"] == 1).all() for value in sign_in.state_dict()["factors"].values())


def test_weights_that_something_else_changed_begin_anew():
    net = sparse_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    sign_in = SignIn(net, optimizer, 100)
    images, classes = batch(0)
    F.cross_entropy(net(images), classes).backward()
    optimizer.step()
    layer, factors = net.layers["head"], sign_in._factors["head"]
    with torch.no_grad():
        layer.parameter.mul_(3.0)
    sign_in._follow(factors, optimizer)
    assert (factors.scale == 1).all()
    assert torch.equal(factors.inner, layer.parameter.detach()[layer.mask])


def test_signs_flip_more_often():
    flips = {}
    for period in (0, 1):
        net = sparse_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
        method = methods.create("static", masks="given", sign_in=period)
        method.attach(net, optimizer, total_steps=60, steps_per_epoch=10)
        before = {n: x.parameter.detach().sign() for n, x in net.layers.items()}
        train_steps(net, optimizer, method, 60)
        flips[period] = sum(int((x.parameter.detach().sign() != before[n]).sum()) for n, x in net.layers.items())
    assert flips[1] >= flips[0]


def test_a_run_stores_the_products(tmp_path):
    net = sparse_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    method = methods.create("static", masks="given", sign_in=5)
    method.attach(net, optimizer, total_steps=9, steps_per_epoch=3)
    train_steps(net, optimizer, method, 4)
    images, _ = batch(99)
    expected = net.eval()(images)
    growfx.save(net, tmp_path / "out")
    loaded = growfx.load(tmp_path / "out", model=growfx.unwrap(small_net(4)))
    assert torch.allclose(loaded(images), expected, atol=1e-6)


def test_the_methods_that_start_sparse_have_it():
    options = {name: {f.name for f in dataclasses.fields(methods.kind_of(name))} for name in methods.names()}
    have = {name for name, known in options.items() if "sign_in" in known}
    dense = {"acdc", "channel-prune", "continuous", "gmp", "imp", "sup-tickets"}
    assert have == set(methods.names()) - dense


@pytest.mark.parametrize("name", ["gmp", "acdc", "imp", "continuous"])
def test_methods_that_start_dense_have_no_such_option(name):
    with pytest.raises(ConfigError, match=facts(f"`{name}`", "`sign_in`")):
        methods.create(name, sign_in=2)


def test_granet_has_it_only_where_it_starts_sparse():
    with pytest.raises(ConfigError, match=facts("`sign_in`", "`initial_density`")):
        methods.create("granet", density=0.1, sign_in=2)
    methods.create("granet", density=0.1, initial_density=0.5, sign_in=2)


def test_optimizers_that_compute_gradients_within_their_step_are_refused():
    net = sparse_net()
    before = net.mask_digest()
    for name, options in (("static", {"density": 0.1}), ("pwmpr", {"seed_density": 0.1})):
        with pytest.raises(ConfigError, match=facts("`sign_in`", "LBFGS")):
            methods.create(name, sign_in=2, **options).attach(
                net, torch.optim.LBFGS(net.parameters()), total_steps=4, steps_per_epoch=2
            )
        assert net.mask_digest() == before
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    sign_in = SignIn(net, optimizer, 3)
    images, classes = batch(0)

    def closure():
        loss = F.cross_entropy(net(images), classes)
        loss.backward()
        return loss

    with pytest.raises(ConfigError, match=facts("`sign_in`", "closure")):
        optimizer.step(closure)
    assert sign_in.steps == 0
    assert net.mask_digest() == before


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_other_values_are_refused_by_name(value):
    with pytest.raises(ConfigError, match="`sign_in`"):
        methods.create("static", sign_in=value)


@pytest.mark.skipif(bool(training_status()), reason=training_status() or "the kernels are there")
@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_it_is_the_same_training_where_kernels_compute_present_weights_alone(optimizer_name):
    trained = []
    for kernels in ("dense", "sparse"):
        net = growfx.use_kernels(sparse_net(), kernels)
        optimizer = OPTIMIZERS[optimizer_name](net.parameters())
        method = methods.create("static", density=None, masks="given", sign_in=1)
        method.attach(net, optimizer, total_steps=12, steps_per_epoch=4)
        for number in range(8):
            images, classes = batch(number)
            F.cross_entropy(net(images), classes).backward()
            optimizer.step()
            method.step()
            optimizer.zero_grad()
        trained.append(net.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-3, atol=1e-4)
