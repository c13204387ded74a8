"""Layers with more than one weight: recurrences, mixtures of kernels, attention written as a function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from path_enumeration import assert_follows, effective, with_random_masks
from torch import Tensor, fx, nn
from torch.nn import functional as F

import growfx
from growfx.passes.path_products.interpreter import PathGraph
from growfx.passes.path_products.products import path_products


def size(parameter: Tensor) -> Tensor:
    return parameter.detach().double().abs()


class Around(nn.Module):
    """A linear layer, a recurrence over five steps, a linear layer on one of its results."""

    def __init__(self, kind: Any, result: str = "outputs", **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.recurrent = kind(4, 6, **options)
        probe = torch.zeros(5, 5, 4)
        self.result = result
        self.last = nn.Linear(self.chosen(self.recurrent(probe)).shape[-1], 2)

    def chosen(self, results: Any) -> Tensor:
        outputs, states = results
        if self.result == "outputs":
            return outputs
        hidden, *rest = states if isinstance(states, tuple) else (states,)
        return rest[0] if self.result == "cell" else hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.chosen(self.recurrent(self.first(x))))


def one_direction(module: Any, x: Tensor, layer: int, direction: int) -> Tensor:
    """Gates averaged, the recurrence once on the mean over time; x is (time, batch, features)."""
    suffix = f"l{layer}" + "_reverse" * direction
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    into, again = (
        torch.stack(size(getattr(module, f"weight_{kind}_{suffix}")).chunk(gates)).mean(0) for kind in ("ih", "hh")
    )
    out = size(getattr(module, f"weight_hr_{suffix}")) if module.proj_size else torch.eye(into.shape[0]).double()
    entering = x @ into.T
    return (entering + (entering @ out.T).mean(0) @ again.T) @ out.T


def recurrence(module: Any, x: Tensor, result: str) -> Tensor:
    x = x.transpose(0, 1) if module.batch_first else x
    last = []
    for layer in range(module.num_layers):
        directions = [one_direction(module, x, layer, way) for way in range(1 + module.bidirectional)]
        last += [out[-1 if way == 0 else 0] for way, out in enumerate(directions)]
        x = torch.cat(directions, -1)
    if result != "outputs":
        return torch.stack(last)
    return x.transpose(0, 1) if module.batch_first else x


RECURRENCES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "lstm": (nn.LSTM, "outputs", {}),
    "lstm, last state": (nn.LSTM, "hidden", {}),
    "lstm, cell": (nn.LSTM, "cell", {}),
    "lstm, batch first": (nn.LSTM, "outputs", {"batch_first": True}),
    "lstm, both ways": (nn.LSTM, "outputs", {"bidirectional": True, "batch_first": True}),
    "lstm, both ways, last state": (nn.LSTM, "hidden", {"bidirectional": True, "num_layers": 2}),
    "lstm, projected": (nn.LSTM, "outputs", {"proj_size": 2}),
    "gru, two layers": (nn.GRU, "outputs", {"num_layers": 2}),
    "plain": (nn.RNN, "hidden", {"nonlinearity": "relu"}),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", RECURRENCES)
def test_a_recurrence_averages_its_gates_and_recurs_once(kind: str) -> None:
    torch.manual_seed(0)
    make, result, options = RECURRENCES[kind]
    model = Around(make, result, **options).eval()
    shape = (1, 5, 3) if model.recurrent.batch_first else (5, 1, 3)
    net = growfx.wrap(model, torch.randn(shape))
    # Paths are followed at one along the first dimension, whatever the model takes it for.
    ones = torch.ones(1, *shape[1:], dtype=torch.float64)

    def rule(weights: dict[str, Tensor]) -> Tensor:
        middle = recurrence(model.recurrent, ones @ weights["first"].T, result)
        return middle @ weights["last"].T

    assert_follows(net, rule)


class Steps(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(3, 4), cell, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, state = self.first(x), None
        for _ in range(2):
            state = self.cell(x, state)
        return self.last(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize(
    "cell", [nn.LSTMCell(4, 6), nn.GRUCell(4, 6), nn.RNNCell(4, 6)], ids=lambda c: type(c).__name__
)
def test_a_cell_adds_what_enters_to_what_it_remembers(cell: Any) -> None:
    net = growfx.wrap(Steps(cell).eval(), torch.randn(2, 3))
    gates = {nn.LSTMCell: 4, nn.GRUCell: 3}.get(type(cell), 1)
    into, again = (torch.stack(size(weight).chunk(gates)).mean(0) for weight in (cell.weight_ih, cell.weight_hh))

    def rule(weights: dict[str, Tensor]) -> Tensor:
        entering = torch.ones(1, 3).double() @ weights["first"].T @ into.T
        second = entering + entering @ again.T
        return (second + entering if gates == 4 else second) @ weights["last"].T

    assert_follows(net, rule)


# Mixtures of kernels


class Mixed(nn.Module):
    def __init__(self, padding: Any, stride: int = 1, groups: int = 1) -> None:
        from timm.layers.cond_conv2d import CondConv2d

        super().__init__()
        self.stem, self.routing = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)
        self.mixture = CondConv2d(4, 6, 3, stride=stride, padding=padding, groups=groups, num_experts=3)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        routing = torch.sigmoid(self.routing(x.mean((2, 3))))
        return self.head(self.mixture(x, routing))


class Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@pytest.mark.parametrize(("padding", "stride", "groups"), [(1, 1, 1), ("same", 2, 1), (0, 1, 2)])
def test_a_mixture_averages_its_experts_and_its_routing(padding: Any, stride: int, groups: int) -> None:
    torch.manual_seed(0)
    model = Mixed(padding, stride, groups).eval()
    net = with_random_masks(growfx.wrap(model, torch.randn(2, 3, 6, 6)))
    run = PathGraph(net, Leaves().trace(model))
    run.run((torch.ones(1, 3, 6, 6),))
    assert run.total is not None
    run.total.backward()

    weights = {name: effective(net, name).requires_grad_() for name in net.layers}
    x = F.conv2d(torch.ones(1, 3, 6, 6).double(), weights["stem"])
    shares = F.linear(x.mean((2, 3)), weights["routing"]).mean(1).reshape(1, 1, 1, 1)
    kernel = weights.get("mixture", size(model.mixture.weight)).mean(0).reshape(6, 4 // groups, 3, 3)
    if padding == "same":
        x = F.pad(x, (0, 1, 0, 1))
    out = F.conv2d(x, kernel, stride=stride, padding=0 if padding == "same" else padding, groups=groups)
    balance = out.mean().item() / shares.mean().item()
    F.conv2d(out / 2 + shares * balance / 2, weights["head"]).sum().backward()
    for name, weight in weights.items():
        torch.testing.assert_close(run.leaves[name][0].grad, weight.grad, rtol=1e-12, atol=0)


def test_the_experts_of_a_mixture_score_alike_and_its_units_are_channels() -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Mixed(1).eval(), torch.randn(2, 3, 6, 6))
    paths = path_products(net)
    scores = paths.scores["mixture"]
    assert scores.shape == net.layers["mixture"].mask.shape == (3, 4 * 6 * 9)
    torch.testing.assert_close(scores, scores[:1].expand(3, -1))
    assert paths.alive_in["mixture"].tolist() == [True] * 4
    assert paths.alive_out["mixture"].tolist() == [True] * 6


# Attention as a function, and with extra tokens


class Attending(nn.Module):
    def __init__(self, way: str, **options: Any) -> None:
        super().__init__()
        self.first, self.last, self.way = nn.Linear(3, 4), nn.Linear(4, 2), way
        self.attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        x, module = self.first(x).transpose(0, 1), self.attention
        if self.way == "module":
            out = module(x, x, x)[0]
        else:
            projections = (
                {"use_separate_proj_weight": True}
                | {f"{part}_proj_weight": getattr(module, f"{part}_proj_weight") for part in "qkv"}
                if "in_proj_weight" not in dict(module.named_parameters())
                else {}
            )
            inner, outer = module.in_proj_weight, module.out_proj
            out = F.multi_head_attention_forward(
                x, x, x, 4, 2, inner, module.in_proj_bias, module.bias_k, module.bias_v, module.add_zero_attn, 0.0,
                outer.weight, outer.bias, training=False, **projections,
            )[0]  # fmt: skip
        return self.last(out)


def test_attention_as_a_function_scores_as_the_module() -> None:
    torch.manual_seed(0)
    module, function = Attending("module").eval(), Attending("function").eval()
    function.load_state_dict(module.state_dict())
    one, other = (path_products(growfx.wrap(model, torch.randn(2, 5, 3))) for model in (module, function))
    assert set(one.scores) == set(other.scores) == {"first", "attention", "attention.out_proj", "last"}
    for name, score in one.scores.items():
        torch.testing.assert_close(score, other.scores[name], rtol=1e-12, atol=0)
        assert torch.equal(one.alive_in[name], other.alive_in[name])


def test_separate_projections_score_as_a_joint_one() -> None:
    torch.manual_seed(0)
    joint, separate = Attending("function").eval(), Attending("function").eval()
    separate.load_state_dict(joint.state_dict())
    attention: Any = separate.attention
    for part, weight in zip("qkv", joint.attention.in_proj_weight.detach().chunk(3), strict=True):
        attention.register_parameter(f"{part}_proj_weight", nn.Parameter(weight.clone()))
    attention.register_parameter("in_proj_weight", None)
    one, other = (path_products(growfx.wrap(model, torch.randn(2, 5, 3))) for model in (joint, separate))
    assert one.log_total == pytest.approx(other.log_total)
    torch.testing.assert_close(one.scores["first"], other.scores["first"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("way", ["module", "function"])
def test_extra_constant_tokens_of_an_attention_carry_no_path(way: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain, extra = Attending(way).eval(), Attending(way, **options).eval()
    extra.load_state_dict(plain.state_dict(), strict=False)
    one, other = (path_products(growfx.wrap(model, torch.randn(2, 5, 3))) for model in (plain, extra))
    for name, score in one.scores.items():
        torch.testing.assert_close(score, other.scores[name], rtol=1e-12, atol=0)
