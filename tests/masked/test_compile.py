"""`torch.compile`, channels_last and activation checkpointing: the same results, and nothing compiled anew."""

import copy
import dataclasses
import functools

import pytest
import torch
from method_nets import Small, small_net
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training_nets import QUICK, final_state, fresh_net, interrupt_at, loaders

import growfx
from growfx import methods
from growfx.methods.masks import collect_gradients, dense_gradients
from growfx.training.start import train

pytestmark = pytest.mark.slow


class Counted:
    """The backend "eager", that counts how often it is asked."""

    def __init__(self):
        self.compilations = 0

    def __call__(self, graph, inputs):
        self.compilations += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(forward, net, name: str, steps: int = 8):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    until = {} if name == "gmp" else {"update_until": 1.0}
    method = methods.create(name, density=0.3, update_every=2, **until)
    method.attach(net.train(), optimizer, total_steps=steps + 1, steps_per_epoch=3)
    changes, losses = 0, []
    for number in range(steps):
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        loss = F.cross_entropy(forward(images), images.mean((1, 2, 3)).gt(0).long())
        loss.backward()
        optimizer.step()
        net.verify()
        changes += method.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert changes > 0
    return torch.stack(losses)


@pytest.mark.parametrize("name", ["rigl", "snfs", "gmp"])
def test_compiled_training_is_the_same_and_compiled_once_for_all_masks_and_gradients(name):
    eager, compiled, counted = small_net(), small_net(), Counted()
    expected = trained(eager, eager, name)
    losses = trained(torch.compile(compiled, backend=counted), compiled, name)
    torch.testing.assert_close(losses, expected)
    assert compiled.mask_digest() == eager.mask_digest()
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
    assert counted.compilations == 1


def test_gradients_of_compiled_code_are_masked_and_collected_as_others():
    net = small_net().train()
    net.set_masks({k: torch.rand(layer.mask.shape) < 0.4 for k, layer in net.layers.items()})
    compiled, images = torch.compile(net, backend="aot_eager"), torch.randn(4, 3, 8, 8)
    for collects in (False, True, False):
        found, wholes = [], []
        for forward in (net, compiled):
            collect_gradients(net.layers.values(), collects)
            net.zero_grad()
            forward(images).square().mean().backward()
            found.append({k: p.grad.clone() for k, p in net.named_parameters()})
            wholes.append(dense_gradients(net, net.layers)["wide"].clone())
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(*wholes)
        absent = ~net.layers["wide"].mask
        assert not found[1]["wide.weight"][absent].any()
        assert bool(wholes[1][absent].any()) == collects


def test_a_copy_of_a_collecting_network_collects_nothing_in_compiled_code_either():
    net = small_net().train()
    net.set_masks({"wide": torch.rand(net.layers["wide"].mask.shape) < 0.4})
    net.layers["wide"].collects_gradient = True
    twin = copy.deepcopy(net)
    torch.compile(twin, backend="aot_eager")(torch.randn(4, 3, 8, 8)).square().mean().backward()
    layer = twin.layers["wide"]
    assert not layer.collects_gradient
    assert not layer.parameter.grad[~layer.mask].any()


def run(net, folder=None, **how):
    options = dataclasses.replace(QUICK, **how.pop("options", {}))
    method = methods.create("rigl", density=0.3, update_every=4)
    return train(net, *loaders(), method=method, options=options, out=folder, progress=False, **how)


def test_a_compiled_run_is_the_same_run_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, net = fresh_net(), fresh_net()
    run(plain)
    run(net, tmp_path / "whole", options={"compile": True})
    assert net.mask_digest() == plain.mask_digest()
    torch.testing.assert_close(growfx.unwrap(net).state_dict(), growfx.unwrap(plain).state_dict())
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch=1, step=2)
        with pytest.raises(KeyboardInterrupt):
            run(fresh_net(), tmp_path / "cut", options={"compile": True})
    run(fresh_net(), tmp_path / "cut", options={"compile": True}, resume=True)
    states = [final_state(tmp_path / name)["net"] for name in ("whole", "cut")]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_growth_rounds_with_their_averages_run_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    results = []
    for compiled in (False, True):
        method = methods.create(
            "random-growth", seed_density=0.1, max_density=0.2, growth_ratio=2.0, epochs_per_round=1
        )
        options = dataclasses.replace(QUICK, epochs=1, compile=compiled)
        results.append(train(fresh_net(), *loaders(), method=method, options=options, progress=False))
    assert results[0].mask_digest == results[1].mask_digest
    assert [e["nnz"] for e in results[0].trace] == [e["nnz"] for e in results[1].trace]


def test_channels_last_is_the_same_training_in_another_layout(tmp_path):
    plain, net = fresh_net(), fresh_net()
    run(plain)
    run(net, tmp_path / "run", options={"channels_last": True})
    assert net.layers["conv2"].parameter.is_contiguous(memory_format=torch.channels_last)
    assert not net.layers["conv2"].parameter.is_contiguous()
    assert net.nnz == plain.nnz
    torch.testing.assert_close(dict(net.state_dict()), dict(plain.state_dict()), atol=1e-3, rtol=1e-3)
    growfx.save(net, tmp_path / "artifact")
    loaded = growfx.load(tmp_path / "artifact", model=growfx.unwrap(fresh_net()))
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(loaded(images), net.eval()(images))


class Checkpointed(Small):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = x + checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(checkpoint(lambda x: F.relu(self.wide(x)), x, use_reentrant=self.reentrant).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of a recording without gradients
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_of_a_model_train_alike_and_all_their_layers_are_masked(reentrant):
    plain = small_net()
    torch.manual_seed(0)
    net = growfx.wrap(Checkpointed(reentrant), torch.randn(2, 3, 8, 8))
    assert set(net.layers) == set(plain.layers)
    expected = trained(plain, plain, "rigl")
    torch.testing.assert_close(trained(net, net, "rigl"), expected)
    assert net.mask_digest() == plain.mask_digest()


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_whole_network_may_be_checkpointed_from_outside(reentrant):
    plain, net = small_net(), small_net()
    for module in (plain, net):
        module.shell.bn.momentum = 0.0  # the second forward would move its statistics once more
    expected = trained(plain, plain, "rigl")
    losses = trained(lambda x: checkpoint(net, x.requires_grad_(), use_reentrant=reentrant), net, "rigl")
    torch.testing.assert_close(losses, expected)
    assert net.mask_digest() == plain.mask_digest()


@pytest.mark.parametrize("architecture", ["resnet10t", "vit_tiny_patch16_224"])
def test_timms_checkpointing_before_wrapping_gives_the_same_layers_and_gradients(architecture):
    gradients = []
    images = torch.randn(2, 3, 32, 32)
    for checkpointing in (False, True):
        torch.manual_seed(0)
        size = {"img_size": 32} if "vit" in architecture else {}
        model: nn.Module = growfx.create_model(architecture, num_classes=5, **size)
        model.set_grad_checkpointing(checkpointing)
        net = growfx.wrap(model, images, density=0.3).train()
        net(images).square().mean().backward()
        gradients.append({k: p.grad for k, p in net.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


class Lm(nn.Module):
    """A weight that an embedding and a layer share, one that is read in another way, and a parameter to mask."""

    def __init__(self):
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight, self.bare = self.emb.weight, nn.Parameter(torch.randn(6, 6))

    def forward(self, ids):
        x = self.mid(self.emb(ids)).relu() @ self.bare
        return self.head(x + F.linear(x, self.mid.weight.t()))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class OwnForward(nn.Linear):
    def forward(self, input):  # noqa: A002
        return F.linear(input, self.weight.t().t() * 2, self.bias)


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 2))


COMPILED = {
    "tied and bare": (Lm, lambda: torch.randint(0, 9, (2, 3)), ["bare"]),
    "attention": (Attends, lambda: torch.randn(2, 3, 8), []),
    "encoder": (encoder, lambda: torch.randn(2, 3, 8), []),
    "own forward": (lambda: nn.Sequential(OwnForward(8, 8), nn.Linear(8, 2)), lambda: torch.randn(3, 8), []),
}


@pytest.mark.parametrize("written", ["by masks", "by data"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_code_sees_the_masks_of_every_weight_that_it_reads(case, training, written):
    make, inputs, masked = COMPILED[case]
    net = growfx.wrap(make(), inputs(), masked=masked).train(training)
    counted = Counted()
    forward, x = torch.compile(net, backend=counted, fullgraph=True), inputs()
    forward(x)
    for layer in net.layers.values():
        if written == "by masks":
            layer.mask.copy_(torch.rand(layer.mask.shape) < 0.5)
        else:
            layer.mask.data.copy_(torch.rand(layer.mask.shape) < 0.5)
            layer.parameter.data.normal_()
    plain = growfx.unwrap(net)
    torch.testing.assert_close(forward(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(forward(x), plain(x))
    net.zero_grad(), plain.zero_grad()
    forward(x).square().sum().backward(), plain(x).square().sum().backward()
    for name, layer in net.layers.items():
        label = name if name in masked else f"{name}.{layer.weight_name}"
        gradient = torch.where(layer.mask, plain.get_parameter(label).grad, 0)
        found = torch.zeros_like(gradient) if layer.parameter.grad is None else layer.parameter.grad
        torch.testing.assert_close(torch.where(layer.mask, found, 0), gradient)
    assert counted.compilations <= 2  # with and without gradients


@pytest.mark.parametrize("training", [True, False])
def test_a_part_that_is_compiled_alone_sees_the_masks(training):
    net = growfx.wrap(Lm(), torch.randint(0, 9, (2, 3)), masked=["bare"]).train(training)
    for layer in net.layers.values():
        layer.mask.copy_(torch.rand(layer.mask.shape) < 0.5)
        layer.parameter.data.normal_()
    plain, ids = growfx.unwrap(net), torch.randint(0, 9, (2, 3))
    for name, x in (("emb", ids), ("mid", torch.randn(2, 6))):
        part = torch.compile(net.get_submodule(name), backend="eager", fullgraph=True)
        torch.testing.assert_close(part(x), plain.get_submodule(name)(x))
