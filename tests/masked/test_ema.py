"""Averages of weights have the masks of the moment of their last update, and compute within them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_nets import OPTIMIZERS, small_net, train_steps
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn, get_swa_multi_avg_fn

import growfx
from growfx import methods


def update(average: Any, net) -> None:
    if isinstance(average, AveragedModel):
        average.update_parameters(net)
    else:
        average.update(net)


AVERAGES: dict[str, Callable[[Any], Any]] = {
    "timm": lambda net: ModelEmaV3(net, decay=0.9),
    "timm, one by one": lambda net: ModelEmaV3(net, decay=0.9, foreach=False),
    "timm, without buffers": lambda net: ModelEmaV3(net, decay=0.9, exclude_buffers=True),
    "timm, warming up": lambda net: ModelEmaV3(net, decay=0.9, use_warmup=True),
    "torch, mean": AveragedModel,
    "torch, mean of all at once": lambda net: AveragedModel(net, multi_avg_fn=get_swa_multi_avg_fn()),
    "torch, mean one by one": lambda net: AveragedModel(net, avg_fn=get_swa_avg_fn()),
    "torch, moving": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
}


def trained(make: Callable[[Any], Any], updates: int = 3):
    """A network under an exchange of edges every other step, and its average, updated after each step."""
    net = small_net().train()
    optimizer = OPTIMIZERS["sgd"](net)
    method = methods.create("rigl", density=0.3, update_every=2, update_until=1.0, drop_fraction=0.5)
    method.attach(net, optimizer, total_steps=99, steps_per_epoch=3)
    average = make(net)
    train_steps(net, optimizer, method, 1)
    expected = {}
    for number in range(1, 2 * updates):
        train_steps(net, optimizer, method, 1, number)
        update(average, net)
        expected = {k: layer.mask.clone() for k, layer in net.layers.items()}
    return net, optimizer, method, average, expected


def outputs_by_hand(net, images) -> torch.Tensor:
    """What a plain model computes with weights masked by hand."""
    plain = growfx.unwrap(copy.deepcopy(net)).eval()
    with torch.no_grad():
        for name, layer in net.layers.items():
            plain.get_parameter(f"{name}.weight").copy_(torch.where(layer.mask, layer.parameter, 0))
        return plain(images)


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_has_the_masks_of_its_last_update_and_computes_within_them(name):
    net, optimizer, method, average, expected = trained(AVERAGES[name])
    inner = average.module
    assert all(torch.equal(inner.layers[k].mask, mask) for k, mask in expected.items())
    images = torch.randn(4, 3, 8, 8)
    inner.eval()
    assert torch.equal(average(images), outputs_by_hand(inner, images))
    assert inner.nnz == net.nnz

    before = inner.mask_digest()
    assert any(train_steps(net, optimizer, method, 2, 9))
    assert inner.mask_digest() == before != net.mask_digest()  # between a rewiring and the next update: those of before
    update(average, net)
    assert inner.mask_digest() == net.mask_digest()
    assert torch.equal(average(images), outputs_by_hand(inner, images))


def test_weights_are_those_an_average_of_the_effective_weights_has():
    net, optimizer, method, _, _ = trained(AVERAGES["timm"])
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    update(average, net)
    expected = {k: layer.effective_weight.detach().clone() for k, layer in net.layers.items()}
    for number in range(6, 12):
        train_steps(net, optimizer, method, 1, number)
        update(average, net)
        for k, layer in net.layers.items():
            expected[k] = 0.5 * expected[k] + 0.5 * layer.effective_weight.detach()
    for k, layer in average.module.eval().layers.items():
        torch.testing.assert_close(layer.effective_weight, torch.where(layer.mask, expected[k], 0))


def by_name(average: Any, net: Any) -> None:
    """The update of an average as loops write it: every value of a state dict, in place."""
    with torch.no_grad():
        for mean, value in zip(average.module.state_dict().values(), net.state_dict().values(), strict=True):
            mean.copy_(0.9 * mean + 0.1 * value if mean.is_floating_point() else value)


WRITTEN: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    "timm": (AVERAGES["timm"], update),
    "timm, one by one": (AVERAGES["timm, one by one"], update),
    "by name": (AVERAGES["timm"], by_name),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_an_average_written_through_its_state_dict_goes_on_after_every_change_of_masks(name):
    make, write = WRITTEN[name]
    net = small_net().train()
    optimizer = OPTIMIZERS["adamw"](net)
    method = methods.create("rigl", density=0.3, update_every=2, update_until=1.0, drop_fraction=0.5)
    method.attach(net, optimizer, total_steps=99, steps_per_epoch=3)
    average = make(net)
    expected = {k: layer.effective_weight.detach().clone() for k, layer in net.layers.items()}
    for number in range(9):
        train_steps(net, optimizer, method, 1, number)
        write(average, net)
        for k, layer in net.layers.items():  # of an edge that left nothing is remembered
            expected[k] = torch.where(layer.mask, 0.9 * expected[k] + 0.1 * layer.effective_weight.detach(), 0)
    found = average.module.state_dict()
    for k, layer in average.module.eval().layers.items():
        torch.testing.assert_close(found[f"{k}.weight"], expected[k])
        torch.testing.assert_close(layer.effective_weight, expected[k])
        assert found[f"{k}.weight"].data_ptr() == layer.parameter.data_ptr()


def test_masks_averaged_as_numbers_are_all_edges_ever_active_until_they_are_set():
    net, _, _, average, _ = trained(lambda net: ModelEmaV2(net, decay=0.9))
    inner, images = average.module.eval(), torch.randn(4, 3, 8, 8)
    assert inner.nnz > net.nnz
    inner.set_masks({k: layer.mask for k, layer in net.layers.items()})
    assert inner.mask_digest() == net.mask_digest()
    inner.verify()
    assert torch.equal(average(images), outputs_by_hand(inner, images))


def test_an_average_is_saved_with_its_edges(tmp_path):
    net, *_, average, _ = trained(AVERAGES["timm, without buffers"])
    growfx.save(average.module, tmp_path / "average")
    assert growfx.inspect(tmp_path / "average").nnz == net.nnz
    loaded, images = growfx.load(tmp_path / "average", model=growfx.unwrap(small_net())), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(loaded(images), average.module.eval()(images))


LOOKS: dict[str, Callable[[Any], Any]] = {
    "state dict": lambda inner: inner.state_dict(),
    "evaluation": lambda inner: inner.eval()(torch.randn(2, 3, 8, 8)),
    "modes": lambda inner: inner.eval().train(),
    "copy": copy.deepcopy,
    "unwrap": growfx.unwrap,
    "facts": lambda inner: (inner.nnz, inner.density, inner.mask_digest(), str(inner)),
    "path products": growfx.path_products,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", ["torch, moving", "timm"])
def test_looking_at_an_average_changes_nothing(name, look):
    results = []
    for looks in (False, True):
        torch.manual_seed(0)
        net = small_net().train()
        average = AVERAGES[name](net)
        layer = next(iter(net.layers.values()))
        for active in (True, False, True):  # an edge is dropped and grows again
            mask = torch.ones_like(layer.mask)
            mask.view(-1)[0] = active
            layer.mask.copy_(mask)
            update(average, net)
            if looks:
                LOOKS[look](average.module)
        results.append({k: v.clone() for k, v in average.module.named_parameters()})
    assert all(torch.equal(value, results[1][k]) for k, value in results[0].items())


def test_a_deep_copy_goes_its_own_way():
    net, optimizer, method, *_ = trained(AVERAGES["timm"])
    twin = copy.deepcopy(net)
    before = twin.mask_digest()
    assert any(train_steps(net, optimizer, method, 2, 9))
    assert twin.mask_digest() == before != net.mask_digest()


def test_the_average_of_a_copy_in_another_precision_stays_within_its_masks():
    net = small_net().to(torch.bfloat16).train()
    net.set_masks({k: torch.rand(layer.mask.shape) < 0.5 for k, layer in net.layers.items()})
    average = ModelEmaV3(net, decay=0.5, dtype=torch.float32)
    net.set_masks({k: torch.rand(layer.mask.shape) < 0.5 for k, layer in net.layers.items()})
    average.update(net)
    assert average.module.mask_digest() == net.mask_digest()
    assert {layer.parameter.dtype for layer in average.module.layers.values()} == {torch.float32}
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(average.module.eval()(images), outputs_by_hand(average.module, images))


@pytest.mark.parametrize("storage", ["dense", "present"])
def test_a_mean_with_buffers_counts_as_torch_counts(storage: str) -> None:
    def averaged(net: Any) -> dict[str, torch.Tensor]:
        average = AveragedModel(net, use_buffers=True)
        for _ in range(3):
            net.train()(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
            average.update_parameters(net)
        return average.module.state_dict()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    net = growfx.use_kernels(growfx.wrap(copy.deepcopy(model), torch.randn(2, 3, 8, 8)), "dense", storage=storage)
    found = averaged(net)
    for name, value in averaged(model).items():
        assert torch.equal(found[name], value), name
