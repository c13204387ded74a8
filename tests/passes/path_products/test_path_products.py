"""What path products promise whatever the network: scale, masks, modes, off-path layers, alive units, errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from path_enumeration import with_random_masks
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.passes.path_products.interpreter import PathGraph
from growfx.passes.path_products.products import check_path_rules, path_gradients, path_products


def true_scores(paths: Any) -> dict[str, Tensor]:
    return {name: score * math.exp(paths.log_scale) for name, score in paths.scores.items()}


def shares(net: Any, paths: Any) -> dict[str, float]:
    """The part of all path mass that crosses each layer."""
    mass = {}
    for name, score in paths.scores.items():
        magnitude = net.layers[name].effective_weight.detach().double().abs()
        mass[name] = float((score * magnitude).sum()) * math.exp(paths.log_scale - paths.log_total)
    return mass


def deep(width: int = 6, depth: int = 40, size: float = 8.0) -> nn.Module:
    """Values grow by tens of orders of magnitude."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
        nn.init.uniform_(layers[-2].weight, 0, size)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("size", [8.0, 1e-3], ids=["growing", "shrinking"])
def test_rescaling_live_values_changes_nothing(size: float) -> None:
    net = with_random_masks(growfx.wrap(deep(size=size), torch.randn(2, 6)))
    inputs = net.example_inputs()
    runs = [PathGraph(net, net.graph_at(*inputs), rescale=rescale) for rescale in (True, False)]
    for run in runs:
        run.run(inputs)
        assert run.total is not None
        run.total.backward()
    scaled, plain = runs
    assert scaled.exponent != 0
    assert plain.exponent == 0
    for name in net.layers:
        own, reference = scaled.leaves[name][0].grad, plain.leaves[name][0].grad
        assert own is not None
        torch.testing.assert_close(own * 2.0**scaled.exponent, reference, rtol=1e-13, atol=0)


def test_values_far_beyond_float64_keep_finite_scores() -> None:
    net = growfx.wrap(deep(depth=300, size=1e4), torch.randn(2, 6))
    paths = path_products(net)
    assert paths.log_total > 800
    assert all(torch.isfinite(score).all() for score in paths.scores.values())
    assert shares(net, paths)["0"] == pytest.approx(1, rel=1e-9)
    assert shares(net, paths)["598"] == pytest.approx(1, rel=1e-9)


def test_every_layer_of_a_chain_carries_the_whole_mass() -> None:
    net = with_random_masks(growfx.wrap(deep(depth=5), torch.randn(2, 6)))
    assert all(share == pytest.approx(1) for share in shares(net, path_products(net)).values())


@pytest.mark.parametrize("active", [True, False])
def test_a_score_does_not_contain_its_own_weight(active: bool) -> None:
    net = with_random_masks(growfx.wrap(deep(depth=4), torch.randn(2, 6)))
    layer = net.layers["2"]
    row, column = (int(at) for at in (layer.mask == active).nonzero()[0])
    before = true_scores(path_products(net))["2"][row, column]
    with torch.no_grad():
        layer.mask[row, column] = True
        layer.parameter[row, column] = 123.0
    after = true_scores(path_products(net))
    torch.testing.assert_close(after["2"][row, column], before, rtol=1e-12, atol=0)
    assert after["4"].sum() > 0


class Gated(nn.Module):
    """Residual convolutions, with or without a squeeze-and-excite gate on the branch."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 10)
        self.reduce, self.expand = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        branch = self.conv(x)
        if self.gate:
            squeezed = F.relu(self.reduce(branch.mean((2, 3), keepdim=True)))
            branch = branch * torch.sigmoid(self.expand(squeezed))
        return self.head((self.shortcut(x) + branch).mean((2, 3)))


def test_a_gate_leaves_the_main_path_its_shares() -> None:
    torch.manual_seed(0)
    gated = Gated(True).eval()
    plain = Gated(False).eval()
    plain.load_state_dict(gated.state_dict())
    nets = [growfx.wrap(model, torch.randn(2, 3, 8, 8)) for model in (plain, gated)]
    without, with_gate = (shares(net, path_products(net)) for net in nets)
    for name in ("stem", "conv", "shortcut", "head"):
        assert with_gate[name] == pytest.approx(without[name], rel=0.1)
    # Half of what crosses the gated convolution goes through the gate: with a plain sum it would be nearly all.
    assert with_gate["expand"] == pytest.approx(with_gate["conv"] / 2, rel=0.01)


def test_a_functional_swish_equals_the_module() -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sigmoid()

    torch.manual_seed(0)
    written = nn.Sequential(nn.Linear(4, 5), Swish(), nn.Linear(5, 2)).eval()
    module = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 2)).eval()
    module.load_state_dict(written.state_dict())
    one, other = (path_products(growfx.wrap(model, torch.randn(2, 4))) for model in (written, module))
    assert one.log_total == other.log_total
    for name, score in one.scores.items():
        torch.testing.assert_close(score, other.scores[name], rtol=0, atol=0)


class Called(nn.Module):
    def __init__(self, second: nn.Module | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.again = self.fc if second is None else second

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.again(x.flip(1))


def test_a_layer_used_twice_adds_its_uses() -> None:
    torch.manual_seed(0)
    shared, apart = Called().eval(), Called(nn.Linear(3, 3)).eval()
    apart.load_state_dict(shared.state_dict())
    once = true_scores(path_products(growfx.wrap(shared, torch.randn(2, 3))))
    twice = true_scores(path_products(growfx.wrap(apart, torch.randn(2, 3))))
    torch.testing.assert_close(once["fc"], twice["fc"] + twice["again"])


class DirectUse(nn.Module):
    """A layer whose weight the forward uses itself."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.fc, self.out, self.way = nn.Linear(3, 4), nn.Linear(4, 2), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "module":
            x = self.fc(x)
        elif self.way == "linear":
            x = F.linear(x, self.fc.weight, self.fc.bias)
        elif self.way == "doubled":
            x = F.linear(x, 2 * self.fc.weight) / 2
        else:
            x = x @ self.fc.weight.t() + self.fc.bias
        return self.out(x)


@pytest.mark.parametrize("way", ["linear", "transposed", "doubled"])
def test_a_weight_used_directly_scores_as_through_its_layer(way: str) -> None:
    torch.manual_seed(0)
    module = DirectUse("module").eval()
    direct = DirectUse(way).eval()
    direct.load_state_dict(module.state_dict())
    nets = [with_random_masks(growfx.wrap(model, torch.randn(2, 3))) for model in (module, direct)]
    one, other = (path_products(net) for net in nets)
    assert one.log_total == pytest.approx(other.log_total)
    factor = 0.5 if way == "doubled" else 1.0  # the magnitude applied is twice the weight
    torch.testing.assert_close(true_scores(one)["fc"] * factor, true_scores(other)["fc"])
    torch.testing.assert_close(true_scores(one)["out"], true_scores(other)["out"])
    for name in ("fc", "out"):
        assert torch.equal(one.alive_in[name], other.alive_in[name])
        assert torch.equal(one.alive_out[name], other.alive_out[name])


def test_a_standardised_convolution_counts_the_weight_it_applies() -> None:
    from timm.layers import ScaledStdConv2d

    torch.manual_seed(0)
    model = nn.Sequential(ScaledStdConv2d(2, 3, 3), nn.Conv2d(3, 2, 1)).eval()
    nn.init.normal_(model[0].gain)
    net = with_random_masks(growfx.wrap(model, torch.randn(2, 2, 4, 4)))
    layer: Any = net.layers["0"]
    masked = layer.effective_weight.detach().double()
    flat = masked.flatten(1)
    deviation = (flat.var(1, unbiased=False) + layer.eps).sqrt()
    applied = ((flat - flat.mean(1, keepdim=True)) / deviation[:, None]).view_as(masked)
    applied = applied * layer.gain.detach().double() * layer.scale
    plain = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 1)).double().eval()
    plain[0].weight.data.copy_(applied)
    plain[1].weight.data.copy_(net.layers["1"].parameter.detach().double())
    reference = growfx.wrap(plain, torch.randn(2, 2, 4, 4, dtype=torch.float64))
    reference.set_masks({name: net.layers[name].mask for name in ("0", "1")})
    one, other = path_products(net), path_products(reference)
    assert one.log_total == pytest.approx(other.log_total)
    for name, score in true_scores(one).items():
        torch.testing.assert_close(score, true_scores(other)[name])
    assert (one.scores["0"][~net.layers["0"].mask] > 0).any()


class TwoHeads(nn.Module):
    """An auxiliary head for training, a table of positions made by a layer, and a row nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head, self.auxiliary = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.position, self.unread = nn.Linear(1, 4), nn.Linear(4, 4)
        self.register_buffer("grid", torch.linspace(-1, 1, 2)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.fc(x)[:, None] + self.position(self.grid)
        rows = torch.cat([tokens[:, :1], self.unread(tokens[:, 1:])], 1)
        out = self.head(rows[:, 0])
        return out + self.auxiliary(tokens[:, 0]) if self.training else out


def test_layers_no_path_crosses_have_a_reason_and_no_score() -> None:
    net = growfx.wrap(TwoHeads(), torch.randn(2, 3))
    paths = path_products(net)
    assert set(paths.scores) == {"fc", "head"}
    assert set(paths.off_path) == {"auxiliary", "position", "unread"}
    assert "constants" in paths.off_path["position"]
    assert "evaluation" in paths.off_path["auxiliary"]
    assert "no path" in paths.off_path["unread"]
    assert set(paths.alive_in) == set(paths.alive_out) == set(paths.scores)


def test_a_layer_cut_off_by_masks_still_has_scores_and_is_not_off_path() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    net = growfx.wrap(model, torch.randn(2, 3))
    net.set_masks({"1": torch.zeros(4, 4, dtype=torch.bool)})
    paths = path_products(net)
    assert paths.log_total == -math.inf
    assert not paths.off_path
    assert (paths.scores["1"] > 0).all()
    assert not paths.scores["0"].any()
    assert not paths.alive_out["1"].any()


def test_units_are_alive_when_a_path_runs_through_them() -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(2, 3))
    first, second = torch.ones(4, 3).bool(), torch.ones(2, 4).bool()
    first[1], first[:, 2], second[:, 3] = False, False, False
    net.set_masks({"0": first, "2": second})
    paths = path_products(net)
    assert paths.alive_in["0"].tolist() == [True, True, False]
    assert paths.alive_out["0"].tolist() == [True, False, True, False]
    assert paths.alive_in["2"].tolist() == [True, False, True, False]
    assert paths.alive_out["2"].tolist() == [True, True]


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 1, groups=2), nn.ConvTranspose2d(4, 6, 1, groups=2)])
def test_alive_units_of_grouped_convolutions_count_channels(layer: nn.Module) -> None:
    net = growfx.wrap(nn.Sequential(layer).eval(), torch.randn(2, 4, 2, 2))
    mask = torch.zeros_like(net.layers["0"].mask)
    mask[0, 0] = True
    net.set_masks({"0": mask})
    paths = path_products(net)
    assert paths.alive_in["0"].tolist() == [True, False, False, False]
    assert paths.alive_out["0"].tolist() == [True, False, False, False, False, False]


def test_nothing_of_the_network_changes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 1))
    net = growfx.wrap(model, torch.randn(2, 3, 6, 6), density=0.5)
    net.train()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    generator = torch.get_rng_state()
    one = path_products(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert modes == [module.training for module in net.modules()]
    assert all(parameter.grad is None for parameter in net.parameters())
    net.eval()
    with torch.no_grad():
        other = path_products(net)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(score, other.scores[name]) for name, score in one.scores.items())


def test_another_input_size_may_be_given() -> None:
    net = growfx.wrap(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1)).eval(), torch.randn(2, 1, 8, 8))
    small = path_products(net, example_inputs=torch.zeros(5, 1, 4, 4))
    assert math.exp(small.log_scale) * small.scores["0"][0, 0, 1, 1] == pytest.approx(16)


def test_the_embedding_is_the_input_of_a_token_model() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(10, 4), nn.Linear(4, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.fc(self.table(tokens).mean(1))

    net = growfx.wrap(Tokens().eval(), torch.randint(0, 10, (2, 5)))
    scores = true_scores(path_products(net))["fc"]
    torch.testing.assert_close(scores, torch.ones(2, 4, dtype=torch.float64))


def test_outputs_in_containers_all_count() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            return {"one": self.one(x), "rest": [self.two(x), x.shape[0]]}

    paths = path_products(growfx.wrap(Several().eval(), torch.randn(2, 3)))
    for score in true_scores(paths).values():
        torch.testing.assert_close(score, torch.ones(2, 3, dtype=torch.float64))


# Magnitudes of the caller's choice


def normalised(net: Any, axis: int) -> dict[str, Tensor]:
    sizes = {name: layer.effective_weight.detach().double().abs() for name, layer in net.layers.items()}
    return {name: size / size.sum(axis, keepdim=True) for name, size in sizes.items()}


def test_normalised_outgoing_magnitudes_give_the_visits_of_forward_walks() -> None:
    torch.manual_seed(0)
    net = growfx.wrap(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(2, 3))
    steps = normalised(net, 0)
    walks = path_gradients(net, steps, norm="identity")
    visits = {name: steps[name] * score for name, score in true_scores(walks).items()}
    reached = torch.ones(3, dtype=torch.float64)
    for name in ("0", "2"):
        torch.testing.assert_close(visits[name], steps[name] * reached)
        reached = steps[name] @ reached
    assert walks.log_total == pytest.approx(math.log(3))


def test_masks_as_magnitudes_judge_connectivity_alone() -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).eval(), torch.randn(2, 3))
    with torch.no_grad():
        net.layers["0"].parameter.zero_()
    with pytest.warns(growfx.GrowfxWarning, match="`0.weight` is zero"):
        assert not path_products(net).alive_out["0"].any()
    masks = {name: layer.mask for name, layer in net.layers.items()}
    assert path_gradients(net, masks, norm="identity", unit_scales=True).alive_out["0"].all()


@pytest.mark.parametrize(
    ("magnitudes", "message"),
    [
        ({"none": torch.ones(2, 3)}, "`none`"),
        ({"0": torch.ones(3, 2)}, r"\(3, 2\).*\(2, 3\)"),
        ({"0": torch.full((2, 3), -1.0)}, "non-negative"),
        ({"0": torch.full((2, 3), math.nan)}, "finite"),
    ],
)
def test_magnitudes_that_do_not_fit_are_refused(magnitudes: dict[str, Tensor], message: str) -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(3, 2)).eval(), torch.randn(2, 3))
    with pytest.raises(growfx.MaskError, match=message):
        path_gradients(net, magnitudes)


# Errors


def small() -> Any:
    return growfx.wrap(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).eval(), torch.randn(2, 3))


@pytest.mark.parametrize("options", [{"norm": "none"}, {"power": 0}, {"power": math.nan}, {"power": "2"}])
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(growfx.ConfigError, match=next(iter(options))):
        path_products(small(), **options)


# On shapes alone


class Varied(nn.Module):
    """A gate, a table made of constants, a power, a recurrence and a selection."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.gate = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.position, self.recurrent, self.head = nn.Linear(1, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 5)
        self.register_buffer("grid", torch.linspace(-1, 1, 16)[:, None])
        self.end = end

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.conv(x))
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        x = x.flatten(2).mT + self.position(self.grid)
        return self.end(self.head(self.recurrent(x)[0] * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1)))


@pytest.mark.parametrize("end", [lambda x: x, lambda x: x.topk(2)[0]], ids=["all", "top"])
def test_rules_can_be_checked_on_shapes_alone(end: Any) -> None:
    model = Varied(end).eval()
    off_path = path_products(growfx.wrap(model, torch.randn(2, 3, 6, 6))).off_path
    assert list(off_path) == ["position"]
    net = growfx.wrap(copy.deepcopy(model).to("meta"), torch.randn(2, 3, 6, 6, device="meta"))
    assert check_path_rules(net) == check_path_rules(growfx.wrap(model, torch.randn(2, 3, 6, 6))) == off_path


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_missing_rule_is_found_on_any_device(device: str) -> None:
    net = growfx.wrap(Varied(lambda x: torch.cumprod(x, 1)).eval().to(device), torch.randn(2, 3, 6, 6, device=device))
    with pytest.raises(growfx.UnsupportedOperatorError, match=r"`cumprod` \(node .*test_path_products.py:\d+ in .*\)"):
        check_path_rules(net)


def test_an_infinite_weight_is_an_error_that_names_the_node() -> None:
    net = small()
    with torch.no_grad():
        net.layers["1"].parameter[0, 0] = math.inf
    with pytest.raises(growfx.TraceError, match=r"`1` \(node .*not finite"):
        path_products(net)


def test_a_network_without_values_is_refused() -> None:
    with pytest.raises(growfx.TraceError, match="meta device"):
        path_products(small().to("meta"))


def test_an_unfaithful_recording_is_refused() -> None:
    calls: list[int] = []

    class Wavering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return self.fc(x) * len(calls)

    net = growfx.wrap(Wavering().eval(), torch.randn(2, 3))
    assert not net.trace_report.faithful
    with pytest.raises(growfx.TraceError, match="faithful"):
        path_products(net)


def test_a_network_whose_layers_are_all_off_path_is_refused() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Linear(1, 3)
            self.register_buffer("grid", torch.ones(1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.position(self.grid)

    with pytest.raises(growfx.TraceError, match="no masked layer lies on a path"):
        path_products(growfx.wrap(Constant().eval(), torch.randn(2, 3)))


def test_a_network_without_masked_layers_is_refused() -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(3, 2)).eval(), torch.randn(2, 3), exclude=("*",))
    with pytest.raises(growfx.TraceError, match="no masked layer"):
        path_products(net)


def test_inputs_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(growfx.ConfigError, match="example_inputs"):
        path_products(small(), example_inputs=(3,))
