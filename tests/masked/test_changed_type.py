"""Passes over a network whose floating-point type was changed after it was wrapped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import some
from channel_nets import Mobile, Transformer
from torch import Tensor, nn

import growfx
from growfx.commands.inspection import facts_of

TYPES = (torch.float64, torch.float16, torch.bfloat16)
CHANGES: dict[str, Any] = {
    "net": lambda net, dtype: net.to(dtype),
    "model": lambda net, dtype: net.shell.to(dtype),
    "parent": lambda net, dtype: nn.Sequential(net).to(dtype),
    "copy": lambda net, dtype: copy.deepcopy(net).to(dtype),
    "assigned": lambda net, dtype: net.load_state_dict(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in net.state_dict().items()}, assign=True
    ),
}


def changed(net: growfx.MaskedGraph, how: str, dtype: torch.dtype) -> growfx.MaskedGraph:
    result = CHANGES[how](net, dtype)
    return result if isinstance(result, growfx.MaskedGraph) else net


def conv_net() -> tuple[growfx.MaskedGraph, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    return growfx.wrap(Mobile(), x), x


@pytest.mark.parametrize("dtype", some(TYPES, lambda dtype: dtype == torch.bfloat16), ids=str)
@pytest.mark.parametrize("how", CHANGES)
def test_costs_paths_and_plans_do_not_depend_on_the_type(how: str, dtype: torch.dtype) -> None:
    net, x = conv_net()
    cost, paths = growfx.cost(net), growfx.path_products(net).log_total
    net = changed(net, how, dtype)
    assert net.example_inputs()[0].dtype == dtype
    assert growfx.cost(net) == growfx.cost(net, x) == growfx.cost(net, x.to(dtype)) == cost
    assert growfx.path_products(net).log_total == pytest.approx(paths, rel=1e-2)
    assert growfx.plan_channels(net, "flops=0.5").share("flops") <= 0.5
    assert net.eval().graph_module()(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("method", ["pwmpr", "channel-growth"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_growth_pays_in_multiply_accumulates_in_any_type(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Transformer()
    nets = [growfx.wrap(copy.deepcopy(model), torch.randn(2, 7, 5)) for _ in range(2)]
    nets[1].to(dtype)
    shares = []
    for net in nets:
        grower = growfx.methods.create(method, price="flops", seed_density=0.5)
        grower.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=20, steps_per_epoch=5)
        cost = growfx.cost(net)
        shares.append((cost.sparse - cost.rest) / (cost.dense - cost.rest))
    assert shares[1] == pytest.approx(shares[0], abs=0.05)


class Timed(nn.Module):
    """Word numbers, a time in float64 whatever the weights are, and a list of images."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.time, self.head = (
            nn.Embedding(9, 6),
            nn.Linear(6, 8),
            nn.Linear(1, 8),
            nn.Linear(8, 2),
        )

    def forward(self, ids: Tensor, *, time: Tensor, images: list[Tensor]) -> Tensor:
        assert time.dtype == torch.float64
        x = self.hidden(self.words(ids)) + self.time(time.to(self.time.weight.dtype))
        return self.head(torch.relu(x + sum(image.mean() for image in images)))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_only_inputs_of_the_former_type_follow_it(dtype: torch.dtype) -> None:
    named = {"time": torch.ones(2, 1, dtype=torch.float64), "images": [torch.ones(2, 3), torch.ones(4)]}
    net = growfx.wrap(Timed(), ((torch.tensor([1, 2]),), named))
    cost = growfx.cost(net)
    net.to(dtype)
    example = net.example()
    images = example.kwargs["images"]
    assert example.args[0].dtype == torch.int64
    assert example.kwargs["time"].dtype == torch.float64
    assert [image.dtype for image in images] == [dtype, dtype]
    assert growfx.cost(net) == growfx.cost(net, ((torch.tensor([1, 2]),), named)) == cost
    net.float()
    assert [image.dtype for image in net.example().kwargs["images"]] == [torch.float32, torch.float32]
    assert growfx.cost(net) == cost
    assert named["images"][0].dtype == torch.float32


class Casting(nn.Module):
    """Takes images in float32 and casts them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return self.head(torch.relu(self.first(x.to(self.first.weight.dtype))))


def test_inputs_of_another_type_than_the_weights_stay_what_they_are() -> None:
    net = growfx.wrap(Casting().to(torch.bfloat16), torch.randn(2, 6))
    cost = growfx.cost(net)
    for change in (net.double, net.first.float, net.half, net.float):  # the recorded cast is another each time
        change()
        assert net.example_inputs()[0].dtype == torch.float32
        if net.first.weight.dtype == net.head.weight.dtype:
            assert growfx.cost(net) == cost
            assert growfx.plan_channels(net, "flops=0.5").share("flops") == 0.5


def test_a_network_on_the_meta_device_is_counted() -> None:
    net, x = conv_net()
    cost = growfx.cost(net)
    net.to("meta")
    assert growfx.cost(net) == growfx.cost(net, x) == cost


@pytest.mark.parametrize("compact", some([False, True], lambda compact: not compact))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_an_artifact_remembers_inputs_of_the_type_it_was_saved_in(
    dtype: torch.dtype, compact: bool, tmp_path: Path
) -> None:
    net = growfx.wrap(
        growfx.create_model("resnet10t", num_classes=3, stem_width=8, channels=(4, 4, 8, 8)), torch.randn(1, 3, 32, 32)
    )
    net.to(dtype)
    growfx.save(net, tmp_path / "out", compact=compact)
    found = facts_of(str(tmp_path / "out"))
    assert "alive_note" not in found
    assert all("alive_in" in layer for layer in found["layers"])
    model = growfx.load(tmp_path / "out")
    assert next(model.parameters()).dtype == dtype
    assert growfx.cost(growfx.wrap(model)).dense > 0
