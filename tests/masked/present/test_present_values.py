"""Values of present edges: they follow the mask, stand for the whole weight, and refuse what would be lost."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import growfx
from growfx.errors import MaskError
from growfx.masked.present.values import scattered

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(2))


def mask_of(shape: Any, density: float, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def net_of(storage: str, seed: int = 0) -> growfx.MaskedGraph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4))
    net = growfx.wrap(model, IMAGES[:1], density=0.4, seed=seed)
    return growfx.use_kernels(net, "dense", storage=storage)


def gradients(net: growfx.MaskedGraph, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    out = (net if call is None else call)(IMAGES)
    F.cross_entropy(out.float(), torch.arange(8) % 4).backward()
    return {name: found for name, layer in net.layers.items() if (found := layer.gradient) is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# -- following masks ----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(old=st.integers(0, 99), new=st.integers(0, 99), before=st.floats(0, 1), after=st.floats(0, 1))
def test_edges_that_stay_keep_value_gradient_and_state_and_new_ones_start_at_zero(old, new, before, after):
    net = growfx.wrap(nn.Sequential(nn.Linear(7, 5)), torch.randn(1, 7))
    net.set_masks({"0": mask_of((5, 7), before, old)})
    growfx.use_kernels(net, "dense", storage="present")
    layer, optimizer = net.layers["0"], torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(2):
        net(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
    kept: Any = optimizer.state[layer.values]
    whole = {"value": layer.weight.detach() + 0, "gradient": layer.gradient}
    for key in ("exp_avg", "exp_avg_sq"):
        whole[key] = torch.zeros(5, 7).masked_scatter(layer.mask, kept[key])
    wanted = mask_of((5, 7), after, new)
    net.set_masks({"0": wanted})
    found = {"value": layer.values.detach(), "gradient": layer.values.grad, "exp_avg": kept["exp_avg"]}
    found["exp_avg_sq"] = kept["exp_avg_sq"]
    for key, value in found.items():
        assert torch.equal(value, whole[key][wanted]), key
    assert layer.values.shape == (int(wanted.sum()),)


@pytest.mark.parametrize("write", ["in place", "data", "numpy"])
def test_whoever_writes_to_a_mask_the_next_use_has_its_edges(write):
    net, expected = net_of("present"), net_of("dense")
    wanted = mask_of(net.layers["0"].mask.shape, 0.6, 7)
    expected.set_masks({"0": wanted})
    mask = net.layers["0"].mask
    if write == "in place":
        mask.copy_(wanted)
    elif write == "data":
        mask.data.copy_(wanted)
    else:
        mask.numpy()[...] = wanted.numpy()
    assert_equal(gradients(net), gradients(expected))
    assert net.layers["0"].values.shape == (int(wanted.sum()),)


def test_a_graph_of_an_earlier_step_that_is_still_alive_does_not_disturb_the_next():
    net = net_of("present")
    loss = net(IMAGES).sum()  # a loop's variable
    loss.backward()
    net.zero_grad()
    net.set_masks({name: torch.ones_like(layer.mask) for name, layer in net.layers.items()})
    assert gradients(net)["0"].count_nonzero() == net.layers["0"].numel


def test_a_layer_without_edges_collects_the_gradients_of_all_backward_passes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    collected = []
    for parts in (1, 2):
        net = growfx.wrap(copy.deepcopy(model), torch.randn(1, 4))
        net.set_masks({"1": torch.zeros(2, 4, dtype=torch.bool)})
        layer = growfx.use_kernels(net, "dense", storage="present").layers["1"]
        layer.collects_gradient = True
        for part in torch.ones(4, 4).cumsum(0).chunk(parts):
            net(part).sum().backward()
        collected.append(layer.present.take_collected())
    torch.testing.assert_close(collected[1], collected[0])
    assert collected[0].any()


@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_a_mask_that_changes_between_forward_and_backward_is_an_error_that_says_so(kernels):
    net = growfx.use_kernels(net_of("present"), kernels)
    out = net(IMAGES).sum()
    net.set_masks({"0": torch.ones_like(net.layers["0"].mask)})
    with pytest.raises(MaskError, match=r"`0`.*between a forward and its backward.*backward"):
        out.backward()


# -- the whole weight ---------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[growfx.MaskedGraph, Tensor], Tensor]] = {
    "plain": lambda net, x: net(x),
    "checkpointed": lambda net, x: checkpoint(net, x, use_reentrant=False),
    "saved on the CPU": lambda net, x: _saved_elsewhere(net, x),
    "channels last": lambda net, x: net.to(memory_format=torch.channels_last)(
        x.contiguous(memory_format=torch.channels_last)
    ),
}


def _saved_elsewhere(net: growfx.MaskedGraph, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return net(x)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_gradients_are_those_of_whole_weights_bit_for_bit(call, kernels):
    nets = [growfx.use_kernels(net_of(storage), kernels) for storage in ("present", "dense")]
    found, expected = (gradients(net, lambda x, net=net: CALLS[call](net, x)) for net in nets)
    assert_equal(found, expected)


@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_gradients_under_autocast_are_those_of_whole_weights(kernels):
    found, expected = ({}, {})
    for storage, into in (("present", found), ("dense", expected)):
        with torch.autocast("cpu", torch.bfloat16):
            into.update(gradients(growfx.use_kernels(net_of(storage), kernels)))
    assert_equal(found, expected)


def test_second_derivatives_are_those_of_whole_weights():
    found = []
    for storage in ("present", "dense"):
        net, x = net_of(storage), IMAGES.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append({name: layer.gradient for name, layer in net.layers.items()})
    assert_equal(*found)


def test_no_whole_weight_is_kept_between_forward_and_backward(monkeypatch):
    built: list[StorageWeakRef] = []

    def noted(present: Any, mask: Tensor) -> Tensor:
        weight = scattered(present, mask)
        built.append(StorageWeakRef(weight.untyped_storage()))
        return weight

    monkeypatch.setattr("growfx.masked.present.values.scattered", noted)
    net = net_of("present")
    out = net(IMAGES)
    assert len(built) == 2
    assert all(weight.expired() for weight in built)
    out.sum().backward()
    assert len(built) == 4
    assert all(weight.expired() for weight in built)


def test_transforms_of_functions_compute_what_whole_weights_do():
    net, expected = net_of("present").eval(), net_of("dense").eval()
    found = torch.func.vmap(lambda image: net(image[None])[0])(IMAGES)
    torch.testing.assert_close(found, expected(IMAGES))
    doubled = {name: value.detach() * 2 for name, value in net.named_parameters()}
    other = {name: value.detach() * 2 for name, value in expected.named_parameters()}
    found = torch.func.functional_call(net, doubled, (IMAGES,))
    assert torch.equal(found, torch.func.functional_call(expected, other, (IMAGES,)))


# -- reading and writing ------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "data": lambda layer: layer.weight.data.zero_(),
    "detached": lambda layer: layer.weight.detach().add_(1),
    "part": lambda layer: layer.weight[0].fill_(1),
    "item": lambda layer: layer.weight.__setitem__(0, 1),
    "out": lambda layer: torch.add(layer.weight, 1, out=layer.weight),
    "init": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "set data": lambda layer: setattr(layer.weight, "data", torch.zeros(5, 3, 3, 3)),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(5, 3, 3, 3))),
    "new tensor": lambda layer: setattr(layer, "weight", torch.zeros(5, 3, 3, 3)),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_would_be_lost_is_refused(write):
    layer: Any = net_of("present").layers["0"]
    before = layer.weight + 0
    with pytest.raises(MaskError, match=r"`0` is read-only.*`storage` = \"present\""), torch.no_grad():
        WRITES[write](layer)
    assert torch.equal(layer.weight, before)


def test_the_weight_can_be_read_differentiated_copied_and_stored():
    net, expected = net_of("present"), net_of("dense")
    layer: Any = net.layers["0"]
    whole: Any = expected.layers["0"]
    assert layer.weight.shape == (5, 3, 3, 3)
    assert torch.equal(layer.weight, whole.weight)
    assert type(layer.weight * 2) is Tensor
    layer.weight.abs().sum().backward()
    whole.effective_weight.abs().sum().backward()
    assert torch.equal(layer.weight.grad, whole.weight.grad)
    assert torch.equal(pickle.loads(pickle.dumps(layer.weight)), whole.weight)
    assert torch.equal(copy.deepcopy(layer.weight), whole.weight)


def test_the_values_are_a_parameter_of_as_many_numbers_as_edges():
    net = net_of("present")
    assert list(dict(net.named_parameters())) == ["0.values", "0.bias", "1.weight", "1.bias", "4.values", "4.bias"]
    for layer in net.layers.values():
        assert isinstance(layer.values, nn.Parameter)
        assert torch.equal(layer.values.detach(), layer.weight[layer.mask].detach())
