"""State dicts, conversions and averages: masks stay bool, tied and whole whoever loads, converts or averages."""

import collections
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

import growfx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.bare = nn.Parameter(torch.randn(4, 4))
        self.head.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x).relu()) @ self.bare


def wrapped(model: nn.Module | None = None, density: float = 0.5) -> growfx.MaskedGraph:
    return growfx.wrap(model or Net(), torch.randn(2, 4), masked=["bare"], density=density)


def assert_right(net: growfx.MaskedGraph) -> None:
    """Masks are bool, those of tied layers one, and the net computes what its plain model does."""
    x = torch.randn(3, 4, dtype=net.get_parameter("bare").dtype)
    assert all(layer.mask.dtype == torch.bool for layer in net.layers.values())
    assert net.get_submodule("head").mask is net.layers["fc"].mask
    net.layers["fc"].mask.logical_and_(torch.rand(4, 4) < 0.7)
    for training in (True, False):
        assert torch.equal(net.train(training)(x), growfx.unwrap(net).train(training)(x))


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_masks_stay_tied_wherever_the_state_dict_is_loaded(depth: int, assign: bool) -> None:
    net, other = wrapped(), wrapped(density=0.3)
    holder, source = net, other
    for _ in range(depth):
        holder, source = nn.Sequential(holder), nn.Sequential(source)
    state = copy.deepcopy(source.state_dict())
    assert not holder.load_state_dict(state, assign=assign).missing_keys
    assert net.mask_digest() == other.mask_digest()
    assert_right(net)


class Renames(Net):
    """Writes and reads its checkpoints in a form of its own."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        state[f"{prefix}version"] = torch.tensor(3)
        return collections.OrderedDict((k.replace("bare", "table"), v) for k, v in state.items())

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        assert int(state_dict["version"]) == 3
        state = {k.replace("table", "bare"): v for k, v in state_dict.items() if k != "version"}
        return super().load_state_dict(state, *args, **kwargs)


def test_state_dicts_that_a_model_writes_and_reads_its_own_way_are_the_nets_with_masks() -> None:
    model = Renames()
    keys = set(model.state_dict())
    net = wrapped(model)
    state = net.state_dict()
    assert set(state) == keys | {"fc.mask", "head.mask", "bare_mask"}
    other = wrapped(Renames(), density=0.3)
    other.load_state_dict(state)
    assert other.mask_digest() == net.mask_digest()
    x = torch.randn(3, 4)
    assert torch.equal(other(x), net(x))
    assert_right(other)
    other.load_state_dict(Renames().state_dict())  # the plain model's
    assert other.nnz < net.nnz
    with pytest.raises(growfx.MaskError, match=r"missing: `head\.mask`"):
        other.load_state_dict({k: v for k, v in state.items() if k != "head.mask"})
    with pytest.raises(AssertionError):
        other.load_state_dict({**state, "version": torch.tensor(2)})
    assert set(growfx.unwrap(net).state_dict()) == keys


def test_hooks_of_the_root_on_state_dicts_run_once_as_on_the_model() -> None:
    seen: list[str] = []
    model = Net()
    model.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    model.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}version": 3}))
    model.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.pop(f"{prefix}version"))
    model.register_load_state_dict_post_hook(lambda *_: seen.append("after loading"))
    net = wrapped(model)
    assert seen == []
    state = net.state_dict()
    assert state["version"] == 3
    assert seen == ["before saving"]
    net.load_state_dict(state)
    assert seen == ["before saving", "after loading"]
    holder = nn.Sequential(net)
    state = holder.state_dict()
    assert state["0.version"] == 3
    holder.load_state_dict(state)
    assert seen == ["before saving", "after loading"] * 2
    assert len(growfx.unwrap(net)._state_dict_hooks) == 1


# -- conversions ------------------------------------------------------------------------------------------------------

CONVERSIONS: dict[str, Any] = {
    "type": lambda net: net.type(torch.float64),
    "type by name": lambda net: net.type("torch.DoubleTensor"),
    "to": lambda net: net.to(torch.float64),
    "double": lambda net: net.double(),
    "half and back": lambda net: net.half().float(),
    "bfloat16 and back": lambda net: net.bfloat16().float(),
    "of a parent": lambda net: nn.Sequential(net).type(torch.float64)[0],
    "of a layer": lambda net: (net.get_submodule("fc").type(torch.float64), net.type(torch.float64))[1],
    "like": lambda net: net.to(torch.ones(1, dtype=torch.float64)),
}


@pytest.mark.parametrize("way", CONVERSIONS)
def test_masks_stay_bool_whatever_the_net_is_converted_to(way: str) -> None:
    net = wrapped()
    digest, density = net.mask_digest(), net.density
    net = CONVERSIONS[way](net)
    assert (net.mask_digest(), net.density) == (digest, density)
    assert_right(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net.train()(torch.randn(3, 4, dtype=net.get_parameter("bare").dtype)).sum().backward()
    optimizer.step()
    net.verify()


# -- averages ---------------------------------------------------------------------------------------------------------

AVERAGES: dict[str, Any] = {
    "mean": {},
    "mean, one by one": {"avg_fn": get_swa_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema, one by one": {"avg_fn": get_ema_avg_fn(0.9)},
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("how", AVERAGES)
def test_an_average_of_torch_has_the_masks_of_its_last_update(how: str, use_buffers: bool, inside: bool) -> None:
    net = wrapped()
    source = nn.Sequential(net) if inside else net
    average = AveragedModel(source, use_buffers=use_buffers, **AVERAGES[how])
    before = {name: getattr(average, name) for name in ("avg_fn", "multi_avg_fn")}
    averaged: Any = average.module[0] if inside else average.module
    for _ in range(4):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_()
        net.set_masks({name: torch.rand(4, 4) < 0.5 for name in net.layers})
        average.update_parameters(source)
        assert averaged.mask_digest() == net.mask_digest()
        x = torch.randn(3, 4)
        torch.testing.assert_close(average(x), growfx.unwrap(averaged)(x))
    assert int(average.n_averaged) == 4
    assert {name: getattr(average, name) for name in before} == before


def test_an_average_of_a_plain_model_is_torchs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    average = AveragedModel(model, use_buffers=True)
    seen = []
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.normal_(), model[1].running_mean.normal_()
        seen.append((model[0].weight.detach().clone(), model[1].running_mean.clone()))
        average.update_parameters(model)
    for found, values in zip(
        (average.module[0].weight, average.module[1].running_mean), zip(*seen, strict=True), strict=True
    ):
        torch.testing.assert_close(found, torch.stack(values).mean(0))
