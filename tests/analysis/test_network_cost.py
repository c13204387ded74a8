"""`growfx.cost`: multiply-accumulates of a forward pass, layer by layer, dense and under the masks."""

import json

import pytest
import torch
from error_facts import facts
from torch import nn

import growfx
from growfx.analysis.cost import forward_flops
from growfx.errors import ConfigError, TraceError


def net_of_two() -> growfx.MaskedGraph:
    """A convolution used at 4x4 positions and a linear layer used at one; the head is not masked."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5), nn.Linear(5, 2)
    )
    return growfx.wrap(model, torch.zeros(2, 3, 4, 4), exclude=("5",))


def test_each_weight_counts_once_at_each_position_it_is_applied_at():
    net = net_of_two()
    net.layers["0"].mask.view(-1)[:100] = False
    found = growfx.cost(net)
    assert list(found.layers) == ["0", "4"]
    assert (found.layers["0"].dense, found.layers["0"].sparse) == (162 * 16, pytest.approx(62 * 16))
    assert (found.layers["4"].dense, found.layers["4"].sparse) == (96 * 5, 96 * 5)
    assert found.rest == 5 * 2
    assert found.dense == 162 * 16 + 96 * 5 + 10
    assert found.sparse == pytest.approx(62 * 16 + 96 * 5 + 10)
    assert (found.sparse, found.dense) == pytest.approx(forward_flops(net))


def test_it_is_of_one_sample_of_the_inputs_given():
    net = growfx.wrap(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 1)), torch.zeros(2, 3, 4, 4))
    assert growfx.cost(net).dense == 16 * (162 + 12)
    assert growfx.cost(net, torch.zeros(7, 3, 4, 4)) == growfx.cost(net)
    # another size is recorded anew, and what runs for that is not counted
    assert growfx.cost(net, torch.zeros(1, 3, 8, 8)).dense == 4 * growfx.cost(net).dense
    assert growfx.cost(net, torch.zeros(1, 3, 8, 8)).rest == 0
    with pytest.raises(TraceError):
        growfx.cost(net, "images")


def test_json_holds_all_of_it_and_the_table_names_every_layer():
    found = growfx.cost(net_of_two())
    again = json.loads(json.dumps(found.to_json()))
    assert again["layers"] == {name: {"dense": x.dense, "sparse": x.sparse} for name, x in found.layers.items()}
    assert (again["rest"], again["dense"], again["sparse"]) == (found.rest, found.dense, found.sparse)
    assert "2,592" in str(found)
    assert "not masked" in str(found)


class Counting(nn.Module):
    """A forward with memory and chance: a counter, a norm, noise."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.norm(self.layer(x)) + torch.rand(())


def test_counting_leaves_buffers_modes_and_generators_as_they_were():
    net = growfx.wrap(Counting(), torch.zeros(2, 4))
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    growfx.cost(net)
    assert net.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_is_not_a_masked_network_is_refused_by_name():
    with pytest.raises(ConfigError, match=facts("growfx.cost", "Linear", "growfx.wrap")):
        growfx.cost(nn.Linear(2, 2))


def test_inputs_without_a_batch_are_one_sample() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    for inputs in (torch.randn(6), torch.randn(1, 6), torch.randn(4, 6)):
        assert growfx.cost(growfx.wrap(model, inputs)).dense == 6 * 8 + 8 * 2
    convolution = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1))
    assert growfx.cost(growfx.wrap(convolution, torch.randn(3, 6, 6))).dense == 4 * 4 * (3 * 4 * 9 + 4 * 2)


def test_a_table_beside_the_batch_leaves_the_cost_that_of_a_sample() -> None:
    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 8)

        def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + shift

    net = growfx.wrap(Shifted(), (torch.randn(4, 6), torch.randn(1, 8)))
    assert growfx.cost(net).dense == 6 * 8


class Asking(nn.Module):
    """Attention of learned queries, which a layer is given as a view of the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 3, 8))
        self.query, self.key, self.head = nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = self.query(self.queries.expand(len(x), -1, -1)), self.key(x)
        return self.head((query @ key.mT).softmax(-1) @ key).mean(1)


def test_layers_that_are_given_views_of_parameters_are_counted() -> None:
    net = growfx.wrap(Asking(), torch.randn(2, 6, 4))
    found = growfx.cost(net)
    assert {name: layer.dense for name, layer in found.layers.items()} == {"query": 192, "key": 192, "head": 120}
    assert found.rest == 2 * 3 * 6 * 8
