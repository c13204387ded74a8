"""Folded norms against the network with its norms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from breadth import some
from connect_nets import NETS, build
from torch import Tensor, nn

import growfx
from growfx.errors import TraceError
from growfx.passes.fold_norm import FoldedNorms, fold_norm


def lively(model: nn.Module) -> nn.Module:
    """Norms with scales of both signs, shifts and statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.2, 3.0)
    return model.double().eval()


def folded(model: nn.Module, x: Tensor, density: float = 1.0) -> tuple[growfx.MaskedGraph, FoldedNorms]:
    """The result of folding, its outputs compared on other inputs."""
    net = growfx.wrap(lively(model), x.double(), density=density)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = fold_norm(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    other = torch.randn_like(x.double())
    with torch.no_grad():
        torch.testing.assert_close(result.model(other), net.eval()(other), rtol=1e-10, atol=1e-10)
    return net, result


IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LAYERS: dict[str, tuple[nn.Module, nn.Module]] = {
    "convolution": (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)),
    "convolution without bias": (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)),
    "grouped": (nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)),
    "transposed": (nn.ConvTranspose2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)),
    "transposed and grouped": (nn.ConvTranspose2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6)),
    "without scale and shift": (nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6, affine=False)),
    "padded with copies": (nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_norm_goes_into_the_layer_before_it(name: str) -> None:
    layer, norm = copy.deepcopy(LAYERS[name])
    net, result = folded(nn.Sequential(layer, norm, nn.ReLU()), IMAGE, density=0.5)
    assert result.folded == {"1": "0"}
    assert isinstance(result.model.get_submodule("1"), nn.Identity)
    weight = result.model.get_parameter("0.weight")
    assert not weight[~net.layers["0"].mask].any()
    assert not torch.signbit(weight[~net.layers["0"].mask]).any()


def test_a_norm_over_features_goes_into_a_linear_layer() -> None:
    _, result = folded(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()), torch.randn(3, 4))
    assert result.folded == {"1": "0"}


def test_a_norm_over_positions_behind_a_linear_layer_stays() -> None:
    _, result = folded(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.randn(3, 6, 4))
    assert result.kept == {"1": "the features of `0` are not the channels of the norm"}


class Readers(nn.Module):
    """A convolution that is read by its norm and by others, or called twice, or not there."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=how != "batch")

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "read":
            return self.norm(y) + y
        if self.how == "layer twice":
            return self.norm(self.a(y))
        if self.how == "norm twice":
            return self.norm(self.norm(y))
        if self.how == "activation":
            return self.norm(torch.relu(y))
        return self.norm(y)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("read", "`a` is read by others too"),
        ("layer twice", "`a` is used several times"),
        ("norm twice", "it is used several times"),
        ("activation", "no convolution or linear layer stands right before it"),
        ("batch", "it has no running statistics"),
    ],
)
def test_where_a_norm_reads_more_than_one_layer_gives_it_stays(how: str, reason: str) -> None:
    _, result = folded(Readers(how), IMAGE)
    assert result.folded == {}
    assert result.kept == {"norm": reason}
    assert str(result) == f"norm stays: {reason}\n0 norms folded; largest error 0.0e+00"


def test_tied_weights_and_standardised_ones_stay_as_they_are() -> None:
    from timm.layers import StdConv2d

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU())
    model[2].weight = model[0].weight
    _, result = folded(model, IMAGE)
    assert result.kept == {"1": "the weight of `0` is tied or computed"}
    _, result = folded(nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGE)
    assert result.kept == {"1": "no convolution or linear layer stands right before it"}


def test_a_norm_with_an_activation_leaves_it_behind() -> None:
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU), nn.Conv2d(4, 2, 1))
    _, result = folded(model, IMAGE)
    assert result.folded == {"1": "0"}
    assert isinstance(result.model.get_submodule("1"), nn.SiLU)


@pytest.mark.parametrize("name", ["residual", "dense", "flat"])
def test_random_graphs_compute_the_same(name: str) -> None:
    model, x = build(name)
    _, result = folded(model, x, density=0.5)
    assert result.folded.keys() | result.kept.keys() == {"norm"}


ZOO = ["test_resnet", "test_efficientnet", "test_byobnet", "torchvision/squeezenet1_1"]


@pytest.mark.parametrize("name", some(ZOO, lambda name: name == "test_efficientnet"))
def test_models_of_the_zoo_lose_every_norm_behind_a_convolution(name: str) -> None:
    model: Any = growfx.create_model(name, num_classes=4)
    _, result = folded(model, torch.randn(2, 3, 48, 48), density=0.3)
    left = [m for m in result.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(left) == len(result.kept)
    assert bool(result.folded) == ("squeezenet" not in name)


def test_a_network_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    net = growfx.wrap(model, torch.randn(1, 3, 4, 4, device="meta"))
    with pytest.raises(TraceError, match="on the meta device, so its norms have no values to fold; load them first"):
        fold_norm(net)


def test_every_net_of_the_connectivity_tests_can_be_given() -> None:
    for name in NETS:
        model, x = build(name)
        result = fold_norm(growfx.wrap(model, x))
        assert result.largest_error < 1e-12
