"""Fourier transforms, writes to named places and steps against the linear maps that their path rules stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from path_enumeration import assert_follows, with_random_masks
from torch import Tensor, nn
from torch.nn import functional as F

import growfx

Map = Callable[[Tensor], Tensor]
PLACES = torch.tensor([2, 0, 5, 1, 4, 3])


class Between(nn.Module):
    """An operator between two layers; activations have shape (batch, 6)."""

    def __init__(self, function: Map, outputs: int = 6) -> None:
        super().__init__()
        self.first, self.function, self.last = nn.Linear(3, 6), function, nn.Linear(outputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def check(function: Map, rule: Map) -> None:
    torch.manual_seed(0)
    outputs = function(torch.rand(2, 6)).shape[1]
    net = with_random_masks(growfx.wrap(Between(function, outputs).eval(), torch.randn(2, 3)))
    ones = torch.ones(1, 3, dtype=torch.float64)
    assert_follows(net, lambda w: rule(ones @ w["first"].T) @ w["last"].T)


def matrix(transform: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Magnitudes of a linear transform's matrix, from the transform itself: (outputs, inputs)."""
    return transform(torch.eye(size, dtype=torch.float64)).abs().T


LINEAR: dict[str, tuple[Map, Callable[[Tensor], Tensor]]] = {
    "fft": (lambda x: torch.fft.fft(x).abs(), torch.fft.fft),
    "fft, real part": (lambda x: torch.fft.fft(x).real, torch.fft.fft),
    "fft, orthonormal": (lambda x: torch.fft.fft(x, norm="ortho").abs(), lambda x: torch.fft.fft(x, norm="ortho")),
    "fft, padded": (lambda x: torch.fft.fft(x, n=8).abs(), lambda x: torch.fft.fft(x, n=8)),
    "fft, cut": (lambda x: torch.fft.fft(x, n=4).abs(), lambda x: torch.fft.fft(x, n=4)),
    "ifft": (lambda x: torch.fft.ifft(x).abs(), torch.fft.ifft),
    "ifft, forward scale": (lambda x: torch.fft.ifft(x, norm="forward").abs(), lambda x: 6 * torch.fft.ifft(x)),
    "rfft": (lambda x: torch.fft.rfft(x).abs(), torch.fft.rfft),
    "fftn": (lambda x: torch.fft.fftn(x, dim=(-1,)).abs(), torch.fft.fft),
    "shifted": (lambda x: torch.fft.fftshift(x, 1), lambda x: torch.fft.fftshift(x, 1)),
    "fft times a table": (
        lambda x: (torch.fft.fft(x) * (2 + 1j) * torch.arange(6)).abs(),
        lambda x: torch.fft.fft(x) * abs(2 + 1j) * torch.arange(6),
    ),
    "short time": (
        lambda x: torch.stft(x, 4, 2, window=torch.hann_window(4), center=False, return_complex=True).abs().flatten(1),
        lambda x: torch.stft(
            x.relu(), 4, 2, window=torch.hann_window(4, dtype=torch.float64), center=False, return_complex=True
        ).flatten(1),
    ),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_a_transform_is_a_product_with_the_magnitudes_of_its_matrix(kind: str) -> None:
    function, transform = LINEAR[kind]
    table = matrix(transform, 6)
    if kind == "short time":  # all bins of a frame have the window as magnitudes
        table = table.reshape(3, 2, 6).amax(0, keepdim=True).expand(3, 2, 6).reshape(6, 6)
    check(function, lambda x: x @ table.T)


def test_a_half_spectrum_counts_the_frequencies_it_stands_for() -> None:
    twice = torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    there_and_back = lambda x: torch.fft.irfft(torch.fft.rfft(x), n=6)  # noqa: E731
    check(there_and_back, lambda x: (x.sum(-1, keepdim=True) * twice.sum() / 6).expand(-1, 6))


def half(x: Tensor) -> Tensor:
    return torch.stack([x[:, :3], x[:, 3:]], 1).mean(1).repeat(1, 2)


WRITES: dict[str, tuple[Map, Map]] = {
    "index_add": (
        lambda x: torch.zeros_like(x).index_add(1, PLACES, x, alpha=-2),
        lambda x: torch.zeros_like(x).index_add(1, PLACES, 2 * x),
    ),
    "index_add_ to what is there": (
        lambda x: x.clone().index_add_(1, PLACES[:2], x[:, :2]),
        lambda x: x.index_add(1, PLACES[:2], x[:, :2]),
    ),
    "scatter_add_": (
        lambda x: x.new_zeros(x.shape).scatter_add_(1, PLACES.expand_as(x), x),
        lambda x: torch.zeros_like(x).scatter_add(1, PLACES.expand_as(x), x),
    ),
    "scatter": (
        lambda x: x.scatter(1, PLACES[:2].expand(x.shape[0], 2), x[:, :2]),
        lambda x: x.scatter(1, PLACES[:2].expand(x.shape[0], 2), x[:, :2]),
    ),
    "scatter_reduce": (
        lambda x: torch.zeros_like(x).scatter_reduce(1, (PLACES // 2).expand_as(x), x, "amax", include_self=False),
        lambda x: torch.zeros_like(x).scatter_reduce(1, (PLACES // 2).expand_as(x), x, "mean", include_self=False),
    ),
    "index_copy of a constant": (
        lambda x: x.index_copy(1, PLACES[:2], torch.ones(x.shape[0], 2)),
        lambda x: x.index_fill(1, PLACES[:2], 0.0),
    ),
    "index_fill": (lambda x: x.index_fill(1, PLACES[:2], 7.0), lambda x: x.index_fill(1, PLACES[:2], 0.0)),
    "select_scatter": (
        lambda x: torch.select_scatter(x, x[:, 1], 1, 0),
        lambda x: torch.cat([x[:, 1:2], x[:, 1:]], 1),
    ),
    "pad_sequence": (
        lambda x: nn.utils.rnn.pad_sequence([x[0], x[0, :4]], batch_first=True, padding_value=-9.0)[1:],
        lambda x: F.pad(x[:, :4], (0, 2)),
    ),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_write_to_named_places_is_executed_without_its_constants(kind: str) -> None:
    check(*WRITES[kind])


def test_a_write_to_places_chosen_by_data_is_spread_over_all() -> None:
    def chosen(x: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter_add(1, x.argsort(1), x)

    check(chosen, lambda x: x.mean(1, keepdim=True).expand(-1, 6))


TABLE = torch.linspace(-1, 1, 36).view(6, 6)

CONSTANTS: dict[str, tuple[Map, Map]] = {
    "tensordot over one axis": (lambda x: torch.tensordot(x, TABLE, 1), lambda x: x @ TABLE.abs().double()),
    "tensordot over named axes": (
        lambda x: torch.tensordot(x.view(-1, 2, 3), TABLE.view(3, 2, 6), dims=([-1, 1], [0, 1])),
        lambda x: x.view(-1, 2, 3).transpose(1, 2).flatten(1) @ TABLE.abs().double(),
    ),
    "tensordot from the right": (
        lambda x: torch.tensordot(TABLE, x, dims=((1,), (1,))).t(),
        lambda x: x @ TABLE.abs().double().T,
    ),
    "broadcast tensors": (
        lambda x: torch.stack(torch.broadcast_tensors(x[:, :1], 2 * x, TABLE[:1])).sum(0),
        lambda x: x[:, :1] + 2 * x,
    ),
    "distances to points": (lambda x: torch.cdist(x, TABLE), lambda x: x.mean(1, keepdim=True).expand(-1, 6)),
    "distances from points": (lambda x: torch.cdist(TABLE, x).t(), lambda x: x.mean(1, keepdim=True).expand(-1, 6)),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_beside_a_path_value(kind: str) -> None:
    check(*CONSTANTS[kind])


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def same(x: Tensor) -> Tensor:
    return x


ELEMENTWISE: dict[str, Map] = {
    "in place": lambda x: torch.selu_(x.clone()),
    "leaky, in place": lambda x: F.leaky_relu_(x.clone()),
    "sine": torch.sin,
    "cosine": lambda x: x.cos(),
    "fake quantisation": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127),
    "remainder": lambda x: x % 2,
    "spikes with a gradient of their own": Spike.apply,
    "spikes": lambda x: (x > 0).float(),
    "signs": torch.sign,
    "heaviside": lambda x: torch.heaviside(x, torch.zeros(())),
    "signs, straight through": lambda x: x + (x.sign() - x).detach() - x,
}


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elementwise_functions_and_steps_that_go_on_as_data_pass_every_path(kind: str) -> None:
    factor = 3 if "straight" in kind else 1
    check(ELEMENTWISE[kind], lambda x: factor * x)


def spikes(x: Tensor) -> Tensor:
    return (x > 0).float()


MOVED_STEPS: dict[str, tuple[Map, Map]] = {
    "one moment of several": (lambda x: torch.stack([spikes(x), spikes(2 * x)])[1], lambda x: 2 * x),
    "their rate": (lambda x: torch.stack([spikes(x), spikes(3 * x)]).mean(0), lambda x: 2 * x),
    "their number": (lambda x: torch.stack([spikes(x), spikes(3 * x)]).sum(0), lambda x: 4 * x),
    "halves, the other way round": (
        lambda x: torch.cat(spikes(x).chunk(2, 1)[::-1], 1),
        lambda x: torch.cat([x[:, 3:], x[:, :3]], 1),
    ),
    "beside constants": (
        lambda x: torch.cat([spikes(x)[:, :3], torch.ones(len(x), 3)], 1),
        lambda x: torch.cat([x[:, :3], 0 * x[:, 3:]], 1),
    ),
}


@pytest.mark.parametrize("kind", MOVED_STEPS)
def test_steps_carry_their_paths_where_they_are_moved_joined_or_averaged(kind: str) -> None:
    check(*MOVED_STEPS[kind])


def test_a_network_that_gives_spikes_is_scored_by_their_rates() -> None:
    class Spiking(nn.Module):
        def __init__(self, last: Map) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(3, 5), nn.Linear(5, 2), last

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(spikes(self.first(x)))
            return torch.stack([self.last(y), self.last(2 * y)]).mean(0)

    torch.manual_seed(0)
    spiking, graded = (growfx.wrap(Spiking(last).eval(), torch.randn(2, 3)) for last in (spikes, same))
    graded.load_state_dict(spiking.state_dict())
    one, other = growfx.path_products(spiking), growfx.path_products(graded)
    assert one.scores.keys() == {"first", "second"}
    for name, score in one.scores.items():
        torch.testing.assert_close(score, other.scores[name])


LIBRARIES: list[torch.library.Library] = []


def neuron(name: str, *parameters: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """An operator as spikingjelly registers it; its values do not matter, its shapes do."""

    def forward(x: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
        everything = options[len(parameters) + 4]
        return (x > 0).float(), (x if everything else v).clone(), x.clone()

    if not hasattr(getattr(torch.ops, name), "forward"):
        library = torch.library.Library(name, "FRAGMENT")
        given = ", ".join(("Tensor x", "Tensor v", *parameters))
        usual = "float threshold, float? reset, bool detach_reset, float alpha, bool store_v_seq, int surrogate_id"
        library.define(f"forward({given}, {usual}) -> (Tensor, Tensor, Tensor)")
        library.impl("forward", forward, "CompositeExplicitAutograd")
        LIBRARIES.append(library)
    return getattr(torch.ops, name).forward.default


NEURONS: dict[str, tuple[tuple[str, ...], tuple[Any, ...], float, float]] = {
    "sj_if": ((), (), 1.0, 1.0),
    "sj_lif": (("float tau", "bool decay_input"), (4.0, True), 0.75, 0.25),
    "sj_plif": (("Tensor w", "bool decay_input"), (torch.zeros(()), False), 0.5, 1.0),
}


@pytest.mark.parametrize("name", NEURONS)
def test_neurons_add_what_comes_in_to_what_they_keep(name: str) -> None:
    parameters, given, keeps, takes = NEURONS[name]
    operator, usual = neuron(name, *parameters), (1.0, 0.0, True, 2.0)

    def steps(x: Tensor) -> Tensor:
        spikes, last, _ = operator(torch.stack([x, 2 * x]), torch.zeros_like(x), *given, *usual, False, 1)
        after, _, _ = operator(x[None], last, *given, *usual, True, 1)
        return torch.cat([spikes[1], after[0]], 1)

    def rule(x: Tensor) -> Tensor:
        second = keeps * takes * x + takes * 2 * x
        return torch.cat([second, keeps * second + takes * x], 1)

    check(steps, rule)


def test_coordinates_carry_no_path() -> None:
    places = torch.linspace(0, 3, 6)
    check(lambda x: x * places.sin(), lambda x: x * places.sin().abs().double())


def test_a_comparison_that_decides_still_ends_paths() -> None:
    check(lambda x: x * (x > -1e9).float(), same)


def test_a_mixture_of_two_values() -> None:
    check(lambda x: torch.lerp(x, x.flip(1), 0.25), lambda x: 0.75 * x + 0.25 * x.flip(1))


def test_a_bilinear_layer_is_a_product_contracted_with_its_weight() -> None:
    torch.manual_seed(0)
    layer = nn.Bilinear(6, 6, 4)
    as_module = growfx.wrap(Between(lambda x: layer(x, x.flip(1)), 4).eval(), torch.randn(2, 3))
    written = Between(lambda x: torch.einsum("bi,oij,bj->bo", x, layer.weight, x.flip(1)), 4).eval()
    written.load_state_dict({name: value for name, value in as_module.state_dict().items() if "mask" not in name})
    one, other = growfx.path_products(as_module), growfx.path_products(growfx.wrap(written, torch.randn(2, 3)))
    for name in ("first", "last"):
        torch.testing.assert_close(one.scores[name], other.scores[name])


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")
def test_a_grouped_product_takes_each_row_through_its_matrix() -> None:
    experts = torch.randn(2, 8, 8, dtype=torch.bfloat16)

    def grouped(x: Tensor) -> Tensor:
        rows = F.pad(torch.cat([x[:1], x[:1]]), (0, 2)).bfloat16()
        return torch._grouped_mm(rows, experts, torch.tensor([1, 2], dtype=torch.int32)).float().flatten()[None]

    def rule(x: Tensor) -> Tensor:
        return torch.cat([F.pad(x, (0, 2)) @ expert for expert in experts.double().abs()], 1)

    check(grouped, rule)


class Contracted(nn.Module):
    """An einsum of two layers' outputs: (3, 6) and (batch, 3, 6)."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.left, self.right, self.equation = nn.Linear(4, 6), nn.Linear(4, 6), equation

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, self.left(x).sum(0), self.right(x))


@pytest.mark.parametrize(
    ("short", "spelled"),
    [("...j,...j->...", "bj,abj->ab"), ("...j,...k->...", "bj,abk->ab"), ("...j,...j", "bj,abj->ab")],
)
def test_ellipses_for_different_numbers_of_axes_are_aligned_at_their_end(short: str, spelled: str) -> None:
    found = []
    for equation in (short, spelled):
        torch.manual_seed(0)
        net = growfx.wrap(Contracted(equation).eval(), torch.randn(2, 3, 4))
        paths = growfx.path_products(net)
        found.append((paths.log_total, paths.scores["left"] * math.exp(paths.log_scale)))
    assert found[0][0] == pytest.approx(found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
