"""Multiply-accumulates per layer and dense-equivalent epochs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import growfx
from growfx.analysis.cost import CostMeter, forward_cost, forward_flops, layer_flops
from growfx.errors import CheckpointError
from growfx.selection.density import layer_counts


class Mixed(nn.Module):
    """Strided, grouped, transposed and standardised convolutions, a shared use, and a functional linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = self.up(self.grouped(self.grouped(x)))
        return F.linear(x.mean((2, 3)), self.head.weight * 2.0, self.head.bias)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(self.attn(x, x, x, need_weights=False)[0].mean(1))


def mixed():
    torch.manual_seed(0)
    return growfx.wrap(Mixed(), torch.zeros(2, 3, 16, 16))


def test_each_layer_costs_its_weights_times_the_positions_it_is_used_at():
    macs = layer_flops(mixed())
    assert macs == {
        "stem": 8 * 3 * 9 * 8 * 8,
        "grouped": 2 * (8 * 2 * 9) * 8 * 8,  # used twice
        "up": 8 * 4 * 4 * 8 * 8,  # a transposed convolution uses a weight once per input position
        "head": 4 * 5,
    }


def test_cost_is_per_sample_and_follows_the_given_input():
    net = mixed()
    assert layer_flops(net, torch.randn(5, 3, 16, 16)) == layer_flops(net)
    assert layer_flops(net, torch.randn(1, 3, 32, 32))["stem"] == 4 * layer_flops(net)["stem"]


def test_attention_books_its_projections_and_leaves_products_of_activations_in_the_rest():
    cost = forward_cost(growfx.wrap(Attention(), torch.zeros(2, 7, 12)))
    assert cost.layers["attn"] == 3 * 12 * 12 * 7
    assert cost.layers["attn.out_proj"] == 12 * 12 * 7
    assert cost.rest == 2 * 12 * 7 * 7


def test_unmasked_layers_count_at_full_cost_whatever_the_density():
    torch.manual_seed(0)
    net = growfx.wrap(Mixed(), torch.zeros(2, 3, 16, 16), exclude=("stem",))
    net.set_masks({name: torch.zeros_like(layer.mask) for name, layer in net.layers.items()})
    sparse, dense = forward_flops(net)
    assert sparse == forward_cost(net).rest == 8 * 3 * 9 * 8 * 8
    assert dense == sum(layer_flops(mixed()).values())


def test_published_cost_of_an_erk_resnet50():
    """RigL's inference FLOPs of ResNet-50 at 80 and 90 % sparsity are 0.42 and 0.24 of the dense ones."""
    from torchvision.models import resnet50

    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in resnet50().named_parameters() if p.ndim > 1}
    net = growfx.wrap(resnet50(), torch.zeros(1, 3, 224, 224))
    cost = forward_cost(net)
    assert cost.dense == pytest.approx(4.089e9, rel=1e-3)
    for density, published in ((0.2, 0.4138), (0.1, 0.2418), (0.05, 0.1217)):
        counts = layer_counts({n.removesuffix(".weight"): s for n, s in shapes.items()}, density)
        densities = {name: counts[name] / net.layers[name].numel for name in net.layers}
        assert cost.sparse(densities) / cost.dense == pytest.approx(published, abs=5e-4)


def test_an_unfaithful_recording_is_counted_module_by_module():
    net = mixed()
    macs = layer_flops(net)
    net.trace_report.faithful = False
    cost = forward_cost(net)
    assert {name: cost.layers[name] for name in ("stem", "grouped", "up")} == {
        name: macs[name] for name in ("stem", "grouped", "up")
    }
    assert cost.layers["head"] == 0
    assert cost.rest == macs["head"]


def test_counting_leaves_modes_and_statistics_as_they_were():
    net = growfx.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.zeros(2, 3, 8, 8))
    net.train()
    net.get_submodule("1").eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    forward_cost(net)
    assert net.training
    assert net.get_submodule("0").training
    assert not net.get_submodule("1").training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_epochs_are_weighted_by_the_cost_of_their_masks():
    net = mixed()
    meter = CostMeter(net)
    assert meter.add_steps(5, 5) == 1.0
    net.set_masks({"stem": torch.zeros_like(net.layers["stem"].mask)})
    sparse, dense = forward_flops(net)
    meter.read_masks()
    meter.add_steps(30, 10)
    assert meter.dense_equivalent_epochs == pytest.approx(1 + 3 * sparse / dense)
    again = CostMeter(net)
    again.load_state_dict(meter.state_dict())
    assert again.state_dict() == meter.state_dict()
    with pytest.raises(CheckpointError, match="cost meter"):
        again.load_state_dict({"epochs": 1.0})


def counted(model, *inputs, **options):
    return forward_cost(growfx.wrap(model, inputs, **options))


class Over(nn.Module):
    """A layer, an operator over what it returns, and another layer."""

    def __init__(self, width, operator, **parts):
        super().__init__()
        self.first, self.last, self.operator = nn.Linear(4, 6), nn.Linear(width, 2), operator
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.last(self.operator(self, self.first(x)))


@pytest.mark.parametrize(
    ("recurrence", "macs"),
    [
        (nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True), 2 * 4 * 5 * (6 + 5) + 2 * 4 * 5 * (10 + 5)),
        (nn.LSTM(6, 5, proj_size=3), 4 * 5 * (6 + 3) + 5 * 3),
        (nn.GRU(6, 5, bias=False), 3 * 5 * (6 + 5)),
        (nn.RNN(6, 5), 5 * (6 + 5)),
    ],
    ids=["lstm", "projected", "gru", "rnn"],
)
def test_recurrences_count_their_matrices_at_every_step(recurrence, macs):
    width = recurrence.proj_size or recurrence.hidden_size * (1 + recurrence.bidirectional)
    model = Over(width, lambda self, x: self.part(x)[0], part=recurrence)
    steps = 7
    # sequences of one sample, whichever dimension is the batch
    x = torch.randn((1, steps, 4) if recurrence.batch_first else (steps, 1, 4))
    found = counted(model, x)
    samples = 1 if recurrence.batch_first else steps
    assert found.rest * samples == macs * steps
    assert found.dense * samples == (4 * 6 + width * 2 + macs) * steps


MATRIX = nn.Parameter(torch.randn(5, 6))


@pytest.mark.parametrize(
    ("operator", "part", "macs"),
    [
        (lambda self, x: torch.stack([torch.mv(self.part, row) for row in x.unbind()]), MATRIX, 30),
        (lambda self, x: torch.addmv(torch.ones(5), self.part, x[0])[None], MATRIX, 30),
        (lambda self, x: torch.dot(self.part[0], x[0])[None, None].expand(1, 5), MATRIX, 6),
        (lambda self, x: self.part(x, x), nn.Bilinear(6, 6, 5), 5 * 6 * 6),
        (lambda self, x: torch.addbmm(torch.ones(1, 5), x[None], self.part.T[None]), MATRIX, 30),
        (lambda self, x: torch.conv_tbc(x[:, None], self.part.T[None], torch.zeros(5), 0)[:, 0], MATRIX, 30),
    ],
    ids=["mv", "addmv", "dot", "bilinear", "addbmm", "conv_tbc"],
)
def test_products_that_torch_does_not_count_are_counted(operator, part, macs):
    found = counted(Over(5, operator, part=part), torch.randn(1, 4))
    assert found.rest == macs


def test_a_deformable_convolution_counts_as_a_convolution():
    ops = pytest.importorskip("torchvision.ops")

    class Deformed(nn.Module):
        def __init__(self):
            super().__init__()
            self.offsets, self.conv = nn.Conv2d(3, 18, 3), ops.DeformConv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x, self.offsets(x))

    assert counted(Deformed(), torch.randn(1, 3, 8, 8)).rest == 4 * 3 * 9 * 6 * 6


def test_a_layer_that_holds_the_weight_of_a_masked_one_costs_under_its_mask():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.last(self.second(self.first(x)))

    found = counted(Tied(), torch.randn(1, 4), density=0.5)
    assert (found.layers["first"], found.rest) == (2 * 4 * 4, 0)


def test_an_embedding_that_shares_a_masked_weight_costs_nothing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.middle, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.middle(self.table(ids)))

    found = counted(Model(), torch.zeros(1, 5, dtype=torch.long))
    assert found.layers == {"middle": 5 * 4 * 4, "head": 5 * 4 * 9}
    assert found.rest == 0
