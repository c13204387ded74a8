"""Integers and booleans among the inputs: data where layers read them, else ids, positions and masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.passes.connect import connect
from growfx.passes.path_products import path_products


class Reader(nn.Module):
    """Layers and tables, read as a test says."""

    def __init__(self, read: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 6), nn.Linear(6, 3)
        self.table, self.bag = nn.Embedding(20, 8), nn.EmbeddingBag(20, 8)
        self.scale = nn.Parameter(torch.full((8,), 2.0))
        self.read = read

    def forward(self, *given: Any) -> Tensor:
        return self.head(torch.relu(self.fc(self.read(self, *given))))


def true_scores(paths: Any) -> dict[str, Tensor]:
    return {name: score * math.exp(paths.log_scale) for name, score in paths.scores.items()}


def scores_of(read: Callable[..., Tensor], *given: Any) -> dict[str, Tensor]:
    """True scores of a model that reads its inputs so; the weights are the same in every call."""
    torch.manual_seed(0)
    return true_scores(path_products(growfx.wrap(Reader(read).eval(), given)))


ROWS = torch.randint(0, 5, (2, 8))


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (ROWS, lambda m, x: x.float()),
        (ROWS, lambda m, x: x / 1),
        (ROWS.to(torch.uint8), lambda m, x: x.to(torch.float32)),
        (ROWS > 2, lambda m, x: x.float()),
        (ROWS > 2, lambda m, x: x.type_as(m.fc.weight)),
        (ROWS > 2, lambda m, x: torch.where(x, 1.0, -1.0)),
        (torch.tensor([1, 3]), lambda m, x: F.one_hot(x, 8).float()),
        ({"x": ROWS[:1]}, lambda m, x: x["x"].float()),
    ],
)
def test_integers_that_a_layer_reads_score_as_floating_point_data(given: Any, read: Callable[..., Tensor]) -> None:
    floating = scores_of(lambda m, x: x, torch.randn(2, 8))
    found = scores_of(read, given)
    assert found.keys() == floating.keys() == {"fc", "head"}
    for name, score in floating.items():
        torch.testing.assert_close(found[name], score)


@pytest.mark.parametrize(
    "read",
    [
        lambda m, x: m.bag(x),
        lambda m, x: F.embedding_bag(x, m.bag.weight),
        lambda m, x: m.table.weight[x].mean(1),
        lambda m, x: m.table.weight.index_select(0, x[:, 0]),
    ],
)
def test_paths_begin_where_a_table_is_looked_up(read: Callable[..., Tensor]) -> None:
    floating = scores_of(lambda m, x: x, torch.randn(2, 8))
    found = scores_of(read, torch.randint(0, 20, (2, 4)))
    for name, score in floating.items():
        torch.testing.assert_close(found[name], score)


def test_what_is_done_to_bytes_before_the_first_layer_is_on_the_path() -> None:
    """A norm before the layer, and a connection around it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv, self.out = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            x = self.norm(images.float() / 4 - 1)
            return self.out(x + self.conv(x)).mean((2, 3))

    torch.manual_seed(0)
    model = Net().eval()
    model.norm.running_var.copy_(torch.tensor([1.0, 4.0, 9.0]))
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    of_bytes = true_scores(path_products(growfx.wrap(model, images)))
    of_floats = true_scores(path_products(growfx.wrap(model, images.float())))
    assert of_bytes.keys() == {"conv", "out"}
    for name, score in of_floats.items():
        torch.testing.assert_close(of_bytes[name], score)


def test_masks_and_counts_beside_the_data_stay_constants() -> None:
    def masked(model: Any, x: Tensor, mask: Tensor) -> Tensor:
        kept = mask.float()[..., None]
        filled = x * kept + model.scale * (1 - kept)
        return (filled * kept).sum(1) / kept.sum(1).clamp(min=1)

    plain = scores_of(lambda m, x: x.mean(1), torch.randn(2, 4, 8))
    found = scores_of(masked, torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.long))
    for name, score in plain.items():
        torch.testing.assert_close(found[name] / found[name].sum(), score / score.sum())


@pytest.mark.parametrize(
    "join",
    [
        lambda m, x, ids: torch.cat([x[:, :4], F.one_hot(ids[:, 0], 4).float()], 1),
        lambda m, x, ids: torch.stack([ids[:, :4].float(), x[:, :4]], 1).flatten(1),
        lambda m, x, ids: torch.cat(tensors=(x[:, :4], ids[:, :4].float()), dim=1),
        lambda m, x, ids: torch.cat([m.table(ids[:, 0])[:, :4], ids[:, :4].float()], 1),
    ],
)
def test_integers_joined_with_what_paths_lead_to_are_data_too(join: Callable[..., Tensor]) -> None:
    floating = scores_of(lambda m, x: x, torch.randn(2, 8))
    found = scores_of(join, torch.randn(2, 8), torch.randint(0, 4, (2, 8)))
    for name, score in floating.items():
        torch.testing.assert_close(found[name], score)


@pytest.mark.parametrize(
    "positions",
    [
        lambda ids: torch.arange(ids.shape[1]),
        lambda ids: torch.arange(ids.size(-1), device=ids.device),
        lambda ids: torch.ones_like(ids[0]).cumsum(0),
        lambda ids: ids.new_zeros(8),
    ],
)
def test_a_layer_that_reads_positions_alone_stays_off_the_paths(positions: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.where, self.head = nn.Embedding(20, 6), nn.Linear(1, 6), nn.Linear(6, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head((self.table(ids) + self.where(positions(ids).float()[:, None].sin())).mean(1))

    paths = path_products(growfx.wrap(Net().eval(), torch.randint(0, 20, (2, 8))))
    assert set(paths.scores) == {"head"}
    assert set(paths.off_path) == {"where"}


def test_constants_and_weights_copied_by_keyword_are_followed_as_before() -> None:
    def copied(model: Any, x: Tensor) -> Tensor:
        kept = torch.clone(input=model.fc.weight)
        return F.linear(F.linear(x, kept), model.head.weight) + torch.clone(input=model.scale)[:3]

    class Net(Reader):
        def forward(self, *given: Any) -> Tensor:
            return copied(self, *given)

    torch.manual_seed(0)
    net = growfx.wrap(Net(copied).eval(), torch.randn(2, 8))
    assert set(path_products(net).scores) == set(connect(net).layers) == {"fc", "head"}


def test_an_operator_without_a_path_rule_before_the_first_layer_is_no_obstacle() -> None:
    floating = scores_of(lambda m, x: x, torch.randn(2, 8))
    found = scores_of(lambda m, x: torch.lgamma(x.float() + 1), ROWS)
    for name, score in floating.items():
        torch.testing.assert_close(found[name], score)


def test_a_network_that_reads_bytes_grows_and_loses_channels() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

        def forward(self, images: Tensor) -> Tensor:
            x = torch.relu(self.first((images.to(self.head.weight) - 127.5) / 64))
            return self.head(torch.relu(self.second(x)).mean((2, 3)))

    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    net = growfx.wrap(Net().eval(), images)
    connections = connect(net)
    assert connections.layers["second"].sources.tolist() == connections.layers["first"].outputs.tolist()
    assert not set(connections.layers["first"].outputs.tolist()) & connections.pinned.keys()
    (units,) = connections.inputs.values()
    assert connections.layers["first"].sources.tolist() == units.tolist()
    assert "first" in str(growfx.plan_channels(net, "params=0.6"))
    method = growfx.methods.create("pwmpr", seed_density=0.2, epochs_per_round=1, max_density=0.5)
    method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=8, steps_per_epoch=1)
    assert net.density == pytest.approx(0.2, abs=0.01)
    net.first.mask[:4] = False
    expected = net(images)
    small = growfx.unwrap(net, compact=True)
    assert small.first.out_channels == 4
    torch.testing.assert_close(small(images), expected)
