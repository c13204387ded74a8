"""Growth that pays for multiply-accumulates instead of weights."""

import pytest
import torch
from breadth import representative, some
from error_facts import facts
from method_nets import OPTIMIZERS, small_net, train_steps
from torch import nn

import growfx
from growfx import methods
from growfx.errors import ConfigError
from growfx.methods.growth.price import Price

GROWTH = ("gradient-growth", "grow-prune", "pwmpr", "random-growth")


def attached(name="pwmpr", net=None, **options):
    net = small_net() if net is None else net
    optimizer = OPTIMIZERS["sgd"](net)
    options = {"epochs_per_round": 1, "seed_density": 0.1, "price": "flops", **options}
    method = methods.create(name, **options)
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=1)
    return net, optimizer, method


def share_of(net) -> float:
    """Multiply-accumulates of the masked layers over the dense ones, by the public count."""
    found = growfx.cost(net)
    return (found.sparse - found.rest) / (found.dense - found.rest)


def dearest(net) -> float:
    """The price of the dearest edge, as a share of all."""
    found = growfx.cost(net)
    per_edge = [layer.dense / net.layers[name].numel for name, layer in found.layers.items()]
    return max(per_edge) / (found.dense - found.rest)


@pytest.mark.parametrize("name", some(GROWTH, representative))
@pytest.mark.parametrize("masks", ["drawn", "magnitude"])
def test_seed_and_rounds_spend_what_they_may_and_leave_less_than_the_dearest_edge(name, masks):
    net, optimizer, method = attached(name, masks=masks)
    assert 0.1 - dearest(net) < share_of(net) <= 0.1 + 1e-12
    for number in range(3):
        spent = share_of(net)
        train_steps(net, optimizer, method, 1, number)
        method.report(0.5, 0.01)
        assert method.trace[-1]["cost"] == pytest.approx(spent)
        assert method.trace[-1]["density"] != pytest.approx(spent)
        assert 1.3 * spent - dearest(net) < share_of(net) <= 1.3 * spent + 1e-12


@pytest.mark.parametrize("name", some(GROWTH, representative))
def test_growth_ends_within_max_density_of_the_dense_cost(name):
    net, optimizer, method = attached(name, max_density=0.2)
    train_steps(net, optimizer, method, 12)
    assert not method.growing
    assert method.stop_reason == "max_density"
    assert 0.2 - dearest(net) < share_of(net) <= 0.2 + 1e-12


def test_cheap_edges_are_drawn_more_often_in_proportion_to_their_price():
    grown = {}
    for price in ("weights", "flops"):
        net, optimizer, method = attached("random-growth", price=price, seed_density=0.2, growth_ratio=1.5)
        before = {name: layer.nnz for name, layer in net.layers.items()}
        absent = {name: layer.numel - layer.nnz for name, layer in net.layers.items()}
        train_steps(net, optimizer, method, 1)
        method.report(0.5)
        grown[price] = {n: (net.layers[n].nnz - before[n]) / absent[n] for n in before}
    per_edge = {n: x.dense / net.layers[n].numel for n, x in growfx.cost(net).layers.items()}
    assert per_edge["block"] == 4 * per_edge["wide"]
    assert grown["weights"]["wide"] == pytest.approx(grown["weights"]["block"], rel=0.5)
    assert grown["flops"]["wide"] > 2 * grown["flops"]["block"]


def test_the_stop_rule_is_about_cost():
    def accuracy(cost: float) -> float:
        return 0.9 - 0.4 / (1 + (cost / 0.08) ** 4)

    net, optimizer, method = attached()
    for number in range(40):
        train_steps(net, optimizer, method, 1, number)
        method.report(accuracy(share_of(net)), 0.001)
        if not method.growing:
            break
    assert method.stop_reason == "plateau"
    assert accuracy(1.0) - accuracy(share_of(net)) < 0.005
    assert share_of(net) == pytest.approx(method.trace[method.operating_round]["cost"])


def test_growth_by_cost_is_resumed_exactly():
    ends = []
    for cut in (False, True):
        net, optimizer, method = attached()
        train_steps(net, optimizer, method, 1)
        method.report(0.4, 0.01)
        if cut:
            parts = (net.state_dict(), optimizer.state_dict(), method.state_dict())
            net, optimizer, method = attached(net=small_net(seed=5))
            for part, state in zip((net, optimizer, method), parts, strict=True):
                part.load_state_dict(state)
        train_steps(net, optimizer, method, 1, 1)
        method.report(0.5, 0.01)
        ends.append((net.mask_digest(), method.trace))
    assert ends[0] == ends[1]


def test_given_masks_of_another_cost_are_refused_with_both_figures():
    net = small_net()
    net.set_masks({name: torch.rand(x.mask.shape) < 0.3 for name, x in net.layers.items()})
    before = net.mask_digest()
    with pytest.raises(ConfigError, match=facts("`seed_density`", 0.1, f"{share_of(net):.6g}")):
        attached(net=net, masks="given")
    assert net.mask_digest() == before
    attached(net=net, masks="given", seed_density=None)
    assert net.mask_digest() == before


class Scaled(nn.Module):
    """A linear map made of a product and a sum, which no multiply-accumulates are counted of."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 8))
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu((self.layer(x)[:, None, :] * self.scale).sum(2)))


def test_a_layer_whose_cost_cannot_be_counted_is_refused_by_operator():
    net = growfx.wrap(Scaled(), torch.zeros(2, 8), masked=["scale"])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ConfigError, match=facts("`price`", "`scale`", "mul", "exclude")):
        attached(net=net, seed_density=0.5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_an_unknown_price_is_refused_by_name():
    with pytest.raises(ConfigError, match=facts("`price`", "seconds", "`weights`", "`flops`")):
        methods.create("pwmpr", price="seconds")


def test_where_weights_are_the_price_every_edge_costs_one():
    net, optimizer, method = attached(price="weights")
    scope = method._attachment.state.scope
    assert Price().total(scope) == net.numel
    assert Price().spent(scope) == net.nnz
    train_steps(net, optimizer, method, 1)
    method.report(0.5)
    assert "cost" not in method.trace[0]
