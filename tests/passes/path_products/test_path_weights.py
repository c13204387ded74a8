"""Weights that a forward uses itself: layers with a forward of their own, tied and transposed uses, joined weights."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from path_enumeration import assert_follows, effective, with_random_masks
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.passes.operators.classes import is_known, row_of
from growfx.passes.path_products.rules.table import MODULES
from growfx.passes.record.whole import LEAF_KINDS

Weights = dict[str, Tensor]
GATE = torch.tensor([[1.0, 0.0], [0.5, -2.0], [1.0, 1.0], [0.0, 1.0]]).repeat(1, 2)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.linear(x, 0.5 * self.weight, self.bias)


class Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.linear(x, self.weight * GATE.to(x.device), self.bias)


class Gained(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.randn(sizes[1], 1))

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.linear(x, self.weight / self.gain, self.bias)


class Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.linear(x, F.normalize(self.weight), self.bias)


class Standardised(nn.Linear):
    """The statistics are computed in another layout than the weight's own."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        columns = self.weight.t().reshape(-1, self.out_features)
        columns = (columns - columns.mean(0)) / (columns.std(0) + 1e-3)
        return x @ columns + self.bias


class Turned(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x.flip(-1)).flip(-1)


def normalised(weight: Tensor, layer: Any) -> Tensor:
    return F.normalize(weight)


def standardised(weight: Tensor, layer: Any) -> Tensor:
    return (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-3)


def gated(weight: Tensor, layer: Any) -> Tensor:
    return weight * GATE.to(weight)


# What the layer applies, as a function of its weight.
APPLIED: dict[str, tuple[type[nn.Linear], Callable[[Tensor, Any], Tensor]]] = {
    "scaled": (Scaled, lambda weight, layer: 0.5 * weight),
    "divided by a learned gain": (Gained, lambda weight, layer: weight / layer.gain.detach().double()),
    "masked by a table": (Gated, gated),
    "normalised": (Normalised, normalised),
    "standardised in another layout": (Standardised, standardised),
}


def chain(layer: nn.Module) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 2))
    return with_random_masks(growfx.wrap(model.eval(), torch.randn(2, 4)))


@pytest.mark.parametrize("kind", APPLIED)
def test_a_weight_changed_elementwise_counts_as_it_is_applied(kind: str) -> None:
    make, change = APPLIED[kind]
    net = chain(make(4, 4))
    layer = net.layers["2"]
    signed = change(torch.where(layer.mask, layer.parameter.detach().double(), 0), layer)
    applied = torch.where(layer.mask, signed.abs(), 0).requires_grad_()
    first, last = effective(net, "0"), effective(net, "4")
    (torch.ones(1, 4, dtype=torch.float64) @ first.T @ applied.T @ last.T).sum().backward()
    assert applied.grad is not None
    expected = torch.where(GATE != 0, applied.grad, 0) if change is gated else applied.grad
    scores = growfx.path_products(net).scores["2"]
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)  # the model changes it in float32


def by_hook(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old spelling, which many models have
        return torch.nn.utils.weight_norm(layer)


COMPUTED: dict[str, tuple[Callable[[nn.Linear], nn.Module], str]] = {
    "by a parametrization": (torch.nn.utils.parametrizations.weight_norm, "*.original1"),
    "by a hook": (by_hook, "*.weight_v"),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_masked_parameter_that_a_weight_is_computed_from_scores_as_the_weight_does(kind: str) -> None:
    torch.manual_seed(0)
    normed, pattern = COMPUTED[kind]
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), normed(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)).eval()
    net = with_random_masks(growfx.wrap(model, torch.randn(2, 4), masked=[pattern]))
    (name,) = (name for name in net.layers if "2" in name)
    with torch.no_grad():
        next(p for key, p in net.named_parameters() if key.endswith(("original0", "weight_g"))).mul_(3)
    layer, sizes = net.layers[name], [p for p in net[2].parameters() if p.shape == (4, 1)]
    kept = torch.where(layer.mask, layer.parameter.detach().double(), 0)
    applied = (kept / kept.norm(dim=1, keepdim=True) * sizes[0].detach()).abs().requires_grad_()
    first, last = effective(net, "0"), effective(net, "4")
    (torch.ones(1, 4, dtype=torch.float64) @ first.T @ applied.T @ last.T).sum().backward()
    scores = growfx.path_products(net).scores
    torch.testing.assert_close(scores[name], applied.grad, rtol=1e-5, atol=0)
    torch.testing.assert_close((scores["0"] * first).sum(), (scores[name] * applied.detach()).sum(), rtol=1e-5, atol=0)


def test_a_forward_around_the_layers_own_moves_its_units() -> None:
    net = chain(Turned(4, 4))
    ones = torch.ones(1, 4, dtype=torch.float64)
    paths = assert_follows(net, lambda w: (ones @ w["0"].T).flip(-1) @ w["2"].T.flip(-1) @ w["4"].T)
    assert set(paths.alive_in) == {"0", "2", "4"}


def test_a_forward_replaced_on_one_layer_is_followed() -> None:
    layer = nn.Linear(4, 4)
    layer.forward = types.MethodType(Scaled.forward, layer)
    replaced, own = chain(layer), chain(Scaled(4, 4))
    own.load_state_dict(replaced.state_dict())
    expected = growfx.path_products(own).scores
    torch.testing.assert_close(dict(growfx.path_products(replaced).scores), dict(expected))


class SameConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class OtherConv(nn.Conv2d):
    """Only the helper that computes is its own."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), weight, bias, self.stride)


class FirstNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", [SameConv, OtherConv])
def test_convolutions_and_norms_with_a_forward_of_their_own_are_looked_into(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 4, 3, stride=2), FirstNorm(4), nn.Conv2d(4, 2, 1)).eval()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    net = with_random_masks(growfx.wrap(model, torch.randn(2, 3, 8, 8)))
    gain = model[1].weight.detach().double().reshape(4, 1, 1)
    ones = F.pad(torch.ones(1, 3, 8, 8, dtype=torch.float64), (0, 1, 0, 1))
    assert list(net.layers) == ["0", "2"]
    assert not net.trace_report.unmasked
    assert net.trace_report.faithful
    assert_follows(net, lambda w: F.conv2d(F.conv2d(ones, w["0"], stride=2) * gain, w["2"]))


def test_such_a_layer_still_computes_within_its_mask_in_both_modes() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    net = growfx.wrap(nn.Sequential(SameConv(3, 4, 3), FirstNorm(4), nn.Conv2d(4, 2, 1)), x, density=0.5)
    for training in (True, False):
        net.train(training)
        torch.testing.assert_close(net(x), growfx.unwrap(net)(x))
        torch.testing.assert_close(net.graph_module()(x), net(x))
    net.train()
    net(x).sum().backward()
    layer = net.layers["0"]
    assert not bool(layer.parameter.grad[~layer.mask].any())


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class PlainAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_an_attention_with_a_forward_of_its_own_scores_as_the_plain_one() -> None:
    torch.manual_seed(0)
    plain, own = PlainAttention().eval(), SelfAttention(8, 2, batch_first=True).eval()
    own.load_state_dict(plain.attention.state_dict())
    x = torch.randn(2, 3, 8)
    expected = growfx.path_products(growfx.wrap(nn.Sequential(plain), x))
    found = growfx.path_products(growfx.wrap(nn.Sequential(own), x))
    for name in ("", ".out_proj"):
        torch.testing.assert_close(found.scores[f"0{name}"], expected.scores[f"0.attention{name}"], rtol=1e-12, atol=0)


def test_a_class_is_one_node_exactly_where_it_has_a_rule() -> None:
    """The layer classes of timm that compute in their own way, and only they, keep their place in recordings."""
    classes = {kind for kind in vars(timm.layers).values() if isinstance(kind, type) and issubclass(kind, LEAF_KINDS)}
    assert len(classes) > 20
    for kind in classes:
        bare = kind.__new__(kind)
        nn.Module.__init__(bare)
        assert is_known(bare) == (row_of(MODULES, kind) is not None), kind


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, in several spellings."""

    def __init__(self, decode: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.middle, self.decode = nn.Linear(6, 4), nn.Linear(4, 4), decode

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.middle(F.relu(self.encoder(x))), self.encoder.weight)


TIED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear with the transpose": lambda h, w: F.linear(h, w.t()),
    "product": lambda h, w: h @ w,
    "product from the left": lambda h, w: (w.mT @ h.mT).mT,
    "einsum": lambda h, w: torch.einsum("bi,ij->bj", h, w),
    "some columns": lambda h, w: h @ w[:, 1:4],
    "rows": lambda h, w: F.linear(F.linear(h, w[1:].t()), w[:2]),
}


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_weight_scores_the_sum_of_its_uses(kind: str) -> None:
    torch.manual_seed(0)
    decode = TIED[kind]
    small = (lambda h: h[:, 1:]) if kind == "rows" else (lambda h: h)
    model = Tied(lambda h, w: decode(small(h), w)).eval()
    net = with_random_masks(growfx.wrap(model, torch.randn(2, 6)))
    ones = torch.ones(1, 6, dtype=torch.float64)
    paths = assert_follows(net, lambda w: decode(small(ones @ w["encoder"].T @ w["middle"].T), w["encoder"]))
    assert paths.alive_in["encoder"].shape == (6,)
    assert paths.alive_out["encoder"].shape == (4,)


class TiedConv(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(4, 6, 3, 2, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.encoder(x))
        return F.conv_transpose2d(hidden, self.encoder.weight, None, 2, 1, 1, groups=self.encoder.groups)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_tied_convolution_scores_the_sum_of_its_uses(groups: int) -> None:
    torch.manual_seed(0)
    net = with_random_masks(growfx.wrap(TiedConv(groups).eval(), torch.randn(2, 4, 6, 6)))
    ones = torch.ones(1, 4, 6, 6, dtype=torch.float64)

    def rule(weights: Weights) -> Tensor:
        weight = weights["encoder"]
        hidden = F.conv2d(ones, weight, None, 2, 1, 1, groups)
        return F.conv_transpose2d(hidden, weight, None, 2, 1, 1, groups)

    paths = assert_follows(net, rule)
    assert paths.alive_in["encoder"].shape == (4,)


@pytest.mark.parametrize("name", ["pwmpr", "phew", "synflow", "rigl"])
def test_methods_attach_to_a_tied_autoencoder(name: str) -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Tied(TIED["product"]), torch.randn(2, 6))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    options = {} if name == "pwmpr" else {"density": 0.5}
    growfx.methods.create(name, **options).attach(net, optimizer, total_steps=20, steps_per_epoch=5)
    assert 0 < net.density < 1


class Parts(nn.Module):
    """Two layers whose weights are used as one matrix."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.left, self.right, self.join = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), join

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.join(self.left.weight, self.right.weight))


JOINED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "one above the other": (lambda a, b: torch.cat([a, b]), lambda a, b: torch.cat([a, b])),
    "side by side, turned": (lambda a, b: torch.cat([a.t(), b], 0).t().t(), lambda a, b: torch.cat([a.t(), b], 0)),
    "sum": (lambda a, b: a + b, lambda a, b: a + b),
    "difference": (lambda a, b: 2 * (a - b), lambda a, b: 2 * (a + b)),
    "series": (lambda a, b: a @ b, lambda a, b: a @ b),
    "elementwise product": (lambda a, b: a * b.t(), lambda a, b: a * b.t()),
}


@pytest.mark.parametrize("kind", JOINED)
def test_weights_of_several_layers_used_as_one_all_have_scores(kind: str) -> None:
    torch.manual_seed(0)
    join, sizes = JOINED[kind]
    net = with_random_masks(growfx.wrap(Parts(join).eval(), torch.randn(2, 4)))
    ones = torch.ones(1, 4, dtype=torch.float64)
    paths = assert_follows(net, lambda w: ones @ w["first"].T @ sizes(w["left"], w["right"]).T)
    assert not paths.off_path


class Summarised(nn.Module):
    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.table, self.change = nn.Linear(4, 4), nn.Linear(4, 4), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.first(x), self.table.weight)


SUMMARISED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "sum as a factor": (lambda x, w: x * w.sum(0), lambda x, w: x * w.sum(0)),
    "mean as a factor": (lambda x, w: x * w.mean(0), lambda x, w: x * w.mean(0)),
    "padded": (lambda x, w: F.linear(x, F.pad(w[:, 1:], (1, 0))), lambda x, w: x[:, 1:] @ w[:, 1:].T),
    "mixed by a table": (lambda x, w: F.linear(x, GATE @ w), lambda x, w: x @ (GATE.abs().to(w) @ w).T),
    "table last": (lambda x, w: F.linear(x, w @ GATE), lambda x, w: x @ (w @ GATE.abs().to(w)).T),
    "divided by its norm afterwards": (
        lambda x, w: F.linear(x, w) / w.norm(),
        lambda x, w: x @ w.T / w.mean().detach(),
    ),
}


@pytest.mark.parametrize("kind", SUMMARISED)
def test_what_is_computed_from_a_weight_keeps_its_edges(kind: str) -> None:
    torch.manual_seed(0)
    change, sizes = SUMMARISED[kind]
    net = with_random_masks(growfx.wrap(Summarised(change).eval(), torch.randn(2, 4)))
    ones = torch.ones(1, 4, dtype=torch.float64)
    assert_follows(net, lambda w: sizes(ones @ w["first"].T, w["table"]))


def test_a_weight_that_is_fed_by_constants_has_no_score_and_is_named() -> None:
    table = torch.randn(1, 4)
    net = growfx.wrap(Summarised(lambda x, w: x + F.linear(table, w)).eval(), torch.randn(2, 4))
    paths = growfx.path_products(net)
    assert set(paths.scores) == {"first"}
    assert "constants" in paths.off_path["table"]
