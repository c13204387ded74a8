"""Path products equal the explicit list of all paths, network by network."""

from __future__ import annotations

import pytest
import torch
from path_enumeration import Grid, UnitGraph, assert_scores_match, effective, with_random_masks
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.passes.path_products.products import path_products


def wrapped(model: nn.Module, *shape: int) -> growfx.MaskedGraph:
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.normal_()
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_()
    return with_random_masks(growfx.wrap(model.eval(), torch.randn(2, *shape)))


def folded(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_var is not None
    return norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()


class Net(nn.Module):
    """Layers by name and a forward given as a function of them."""

    def __init__(self, forward: object, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.recipe = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.recipe(self, x)


def test_chain_of_linear_layers() -> None:
    net = wrapped(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), 3)
    graph = UnitGraph()
    grid = graph.units((3,))
    for name in ("0", "2", "4"):
        grid = graph.linear(grid, name, effective(net, name))
    assert_scores_match(path_products(net), graph, grid.values())


@pytest.mark.parametrize("norm", ["fold", "identity"])
@pytest.mark.parametrize("power", [1, 2])
def test_strided_convolutions_with_batch_norm(norm: str, power: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 2)
    )
    net = wrapped(model, 2, 4, 4)
    graph = UnitGraph()
    grid = graph.conv(graph.units((2, 4, 4)), "0", effective(net, "0") ** power, stride=2, padding=1)
    grid = graph.scale(grid, folded(model[1]) ** power if norm == "fold" else 1.0)
    grid = graph.conv(grid, "3", effective(net, "3") ** power)
    assert_scores_match(path_products(net, norm=norm, power=power), graph, grid.values())


def test_residual_block_and_global_average() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = F.relu(x + net.branch(x))
        return net.head(x.mean((2, 3)))

    layers = {"stem": nn.Conv2d(1, 2, 1), "branch": nn.Conv2d(2, 2, 3, padding=1), "head": nn.Linear(2, 2)}
    net = wrapped(Net(forward, **layers), 1, 3, 3)
    graph = UnitGraph()
    stem = graph.conv(graph.units((1, 3, 3)), "stem", effective(net, "stem"))
    branch = graph.conv(stem, "branch", effective(net, "branch"), padding=1)
    mean = graph.average(graph.add(stem, branch), (1, 2))
    assert_scores_match(path_products(net), graph, graph.linear(mean, "head", effective(net, "head")).values())


def test_concatenation_with_a_constant_between() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        constant = torch.ones(1, 1, 3, 3).expand(x.shape[0], -1, -1, -1)
        return net.join(torch.cat([net.left(x), constant, net.right(x)], 1))

    layers = {"left": nn.Conv2d(1, 1, 1), "right": nn.Conv2d(1, 2, 3, padding=1), "join": nn.Conv2d(4, 2, 1)}
    net = wrapped(Net(forward, **layers), 1, 3, 3)
    graph = UnitGraph()
    start = graph.units((1, 3, 3))
    left = graph.conv(start, "left", effective(net, "left"))
    right = graph.conv(start, "right", effective(net, "right"), padding=1)
    joined: Grid = {**left, **{(channel + 2, *place): unit for (channel, *place), unit in right.items()}}
    join = effective(net, "join")
    out = graph.conv(joined, "join", join)
    assert_scores_match(path_products(net), graph, out.values())


@pytest.mark.parametrize(("channels", "groups"), [(2, 2), (4, 2)], ids=["depthwise", "grouped"])
def test_grouped_convolutions(channels: int, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, channels, 1), nn.Conv2d(channels, channels, 3, padding=1, groups=groups))
    net = wrapped(model, 1, 3, 3)
    graph = UnitGraph()
    grid = graph.conv(graph.units((1, 3, 3)), "0", effective(net, "0"))
    grid = graph.conv(grid, "1", effective(net, "1"), padding=1, groups=groups)
    assert_scores_match(path_products(net), graph, grid.values())


@pytest.mark.parametrize("pool", [nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)], ids=["average", "maximum"])
def test_pooling_averages_without_counting_padding(pool: nn.Module) -> None:
    net = wrapped(nn.Sequential(nn.Conv2d(1, 2, 1), pool, nn.Conv2d(2, 1, 2)), 1, 4, 4)
    graph = UnitGraph()
    grid = graph.conv(graph.units((1, 4, 4)), "0", effective(net, "0"))
    pooled = graph.units((2, 2, 2))
    for (channel, row, column), unit in pooled.items():
        places = [(channel, 2 * row + down, 2 * column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        inside = [place for place in places if place in grid]
        for place in inside:
            graph.edge(grid[place], unit, 1 / len(inside))
    out = graph.conv(pooled, "2", effective(net, "2"))
    assert_scores_match(path_products(net), graph, out.values())


def test_transposed_convolution() -> None:
    net = wrapped(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ConvTranspose2d(2, 2, 2, stride=2)), 1, 2, 2)
    graph = UnitGraph()
    grid = graph.conv(graph.units((1, 2, 2)), "0", effective(net, "0"))
    weight, out = effective(net, "1"), graph.units((2, 4, 4))
    for (channel, row, column), unit in out.items():
        for source in range(2):
            tap = source, channel, row % 2, column % 2
            graph.edge(grid[source, row // 2, column // 2], unit, float(weight[tap]), ("1", tap))
    assert_scores_match(path_products(net), graph, out.values())


def test_squeeze_and_excitation_gate() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.conv(x)
        gate = torch.sigmoid(net.expand(F.relu(net.reduce(x.mean((2, 3), keepdim=True)))))
        return net.head((x * gate).mean((2, 3)))

    layers = {"conv": nn.Conv2d(1, 2, 1), "reduce": nn.Conv2d(2, 1, 1), "expand": nn.Conv2d(1, 2, 1)}
    net = wrapped(Net(forward, **layers, head=nn.Linear(2, 2)), 1, 2, 2)
    net.set_masks({"reduce": torch.ones(1, 2, 1, 1).bool(), "expand": torch.ones(2, 1, 1, 1).bool()})
    graph = UnitGraph()
    conv = graph.conv(graph.units((1, 2, 2)), "conv", effective(net, "conv"))
    gate = graph.average(conv, (1, 2), keep=True)
    gate = graph.conv(graph.conv(gate, "reduce", effective(net, "reduce")), "expand", effective(net, "expand"))
    gated = graph.product(conv, gate, right_bounded=True)
    out = graph.linear(graph.average(gated, (1, 2)), "head", effective(net, "head"))
    assert_scores_match(path_products(net), graph, out.values())


def glu_function(net: nn.Module, x: Tensor) -> Tensor:
    return net.out(F.glu(net.inner(x)))


def glu_written_out(net: nn.Module, x: Tensor) -> Tensor:
    value, gate = net.inner(x).chunk(2, -1)
    return net.out(value * gate.sigmoid())


def swiglu(net: nn.Module, x: Tensor) -> Tensor:
    value, gate = net.inner(x).chunk(2, -1)
    return net.out(value * F.silu(gate))


@pytest.mark.parametrize(
    ("forward", "bounded"),
    [(glu_function, True), (glu_written_out, True), (swiglu, False)],
    ids=["glu", "sigmoid", "silu"],
)
def test_gated_linear_units(forward: object, bounded: bool) -> None:
    net = wrapped(Net(forward, inner=nn.Linear(3, 6), out=nn.Linear(3, 2)), 3)
    graph = UnitGraph()
    inner = graph.linear(graph.units((3,)), "inner", effective(net, "inner"))
    value: Grid = {(index,): inner[index,] for index in range(3)}
    gate: Grid = {(index,): inner[index + 3,] for index in range(3)}
    gated = graph.product(value, gate, right_bounded=bounded)
    assert_scores_match(path_products(net), graph, graph.linear(gated, "out", effective(net, "out")).values())


def attention_fused(net: nn.Module, x: Tensor) -> Tensor:
    q, k, v = net.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return net.proj(mixed.transpose(1, 2).flatten(2))


def attention_written_out(net: nn.Module, x: Tensor) -> Tensor:
    q, k, v = net.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((q * 0.3) @ k.transpose(-2, -1)).softmax(-1)
    return net.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("forward", [attention_fused, attention_written_out], ids=["fused", "written out"])
def test_attention(forward: object) -> None:
    net = wrapped(Net(forward, qkv=nn.Linear(2, 12), proj=nn.Linear(4, 2)), 2, 2)
    graph = UnitGraph()
    tokens = graph.linear(graph.units((2, 2)), "qkv", effective(net, "qkv"))
    assert_scores_match(path_products(net), graph, attention_units(graph, net, tokens, "proj").values())


def attention_units(graph: UnitGraph, net: growfx.MaskedGraph, tokens: Grid, proj: str) -> Grid:
    """Two heads of size two over two tokens: (token, 3 x head x dim) -> (token, out)."""

    def part(kind: int) -> Grid:  # head, token, dim
        return {(h, t, d): tokens[t, kind * 4 + h * 2 + d] for h in range(2) for t in range(2) for d in range(2)}

    queries = graph.average(part(0), (2,), keep=True)
    keys = graph.average(part(1), (2,), keep=True)
    columns: Grid = {(h, 0, t): unit for (h, t, _), unit in keys.items()}
    logits = graph.product(queries, columns)
    values = graph.average(part(2), (1,), keep=True)
    mixed = graph.product(graph.average(logits, (2,), keep=True), values, left_bounded=True)
    joined: Grid = {(t, h * 2 + d): unit for (h, t, d), unit in mixed.items()}
    return graph.linear(joined, proj, effective(net, proj))


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_module(batch_first: bool) -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        out = net.attention(x, x, x, need_weights=False)[0]
        return out if batch_first else out.transpose(0, 1)

    net = wrapped(Net(forward, attention=nn.MultiheadAttention(4, 2, batch_first=batch_first)), 2, 4)
    graph = UnitGraph()
    tokens = graph.linear(graph.units((2, 4)), "attention", effective(net, "attention"))
    out = attention_units(graph, net, tokens, "attention.out_proj")
    assert_scores_match(path_products(net), graph, out.values())


def test_channel_split_and_shuffle() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        kept, other = net.stem(x).chunk(2, 1)
        x = torch.cat([kept, net.branch(other)], 1)
        size = x.size()
        x = x.view(size[0], 2, 2, size[2], size[3]).transpose(1, 2).reshape(size)
        return net.tail(x)

    layers = {"stem": nn.Conv2d(1, 4, 1), "branch": nn.Conv2d(2, 2, 1), "tail": nn.Conv2d(4, 2, 1, groups=2)}
    net = wrapped(Net(forward, **layers), 1, 2, 2)
    graph = UnitGraph()
    stem = graph.conv(graph.units((1, 2, 2)), "stem", effective(net, "stem"))
    other: Grid = {(c - 2, *place): unit for (c, *place), unit in stem.items() if c >= 2}
    branch = graph.conv(other, "branch", effective(net, "branch"))
    joined: Grid = {**stem, **{(c + 2, *place): unit for (c, *place), unit in branch.items()}}
    shuffled: Grid = {((c % 2) * 2 + c // 2, *place): unit for (c, *place), unit in joined.items()}
    out = graph.conv(shuffled, "tail", effective(net, "tail"), groups=2)
    assert_scores_match(path_products(net), graph, out.values())


def test_layer_norm_and_learned_scale() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(3), nn.Linear(3, 3)
            self.gamma = nn.Parameter(torch.tensor([-0.5, 2.0, 1e-3]))
            nn.init.normal_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.fc(self.norm(x))

    model = Block()
    net = wrapped(model, 3)
    graph = UnitGraph()
    start = graph.units((3,))
    normed = graph.scale(start, model.norm.weight.detach().double().abs())
    branch = graph.linear(normed, "fc", effective(net, "fc"))
    out = graph.add(start, graph.scale(branch, model.gamma.detach().double().abs()))
    assert_scores_match(path_products(net), graph, out.values())
