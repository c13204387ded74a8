"""Unit connectivity against what the networks themselves say when one unit is changed, or cut out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from connect_nets import NETS, build
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.analysis.connectivity import Connectivity
from growfx.passes.connect.interpreter import MODULES, OPERATORS, connect
from growfx.passes.path_products.products import path_products
from growfx.passes.path_products.rules import table as path_rules

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def connected(name: str) -> tuple[Any, nn.Module, Tensor, Connectivity]:
    model, x = build(name)
    net = growfx.wrap(copy.deepcopy(model), x)
    return net, model, x, connect(net)


def channel_axis(module: nn.Module, value: Tensor) -> int:
    return value.ndim - 1 if isinstance(module, nn.Linear) else 1


def changed_columns(
    model: nn.Module, x: Tensor, source: str | None, channel: int, through: Any
) -> dict[str, list[int]]:
    """Which input columns change when one output unit of `source` (or of the input) does and no other layer reacts.

    Layers in `through` react.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    changing = False

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            inputs[name].append(args[0].detach())
            if not changing or name in through:
                outputs[name] = output.detach()
            result = outputs[name].clone()
            if changing and name == source:
                part = result.select(channel_axis(module, result), channel)
                part.add_(torch.randn_like(part))
            return result

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    model(x)
    changing = True
    moved = x.clone()
    if source is None:
        part = moved.select(1 if x.ndim > 3 else x.ndim - 1, channel)
        part.add_(torch.randn_like(part))
    model(moved)
    for handle in handles:
        handle.remove()
    found = {}
    for name, (before, after) in inputs.items():
        axis = channel_axis(layers[name], before)
        differs = (before != after).movedim(axis, 0).flatten(1).any(1)
        found[name] = differs.nonzero().flatten().tolist()
    return found


@pytest.mark.parametrize("name", NETS)
def test_a_unit_feeds_the_columns_that_change_with_it(name: str) -> None:
    _, model, x, found = connected(name)
    fed: dict[int, dict[str, list[int]]] = {}
    for layer in found.layers:
        for column, unit in zip(*(part.tolist() for part in found.feeding(layer)), strict=True):
            fed.setdefault(unit, {}).setdefault(layer, []).append(column)
    mixing = {name for name, layer in found.layers.items() if layer.mixes_positions}
    for source in (None, *found.layers):
        if source is not None and found.layers[source].mixes_positions:
            continue  # its units are positions
        units = next(iter(found.inputs.values())) if source is None else found.layers[source].outputs
        for channel, unit in enumerate(units.tolist()):
            expected = {k: v for k, v in changed_columns(model, x, source, channel, mixing).items() if v}
            assert fed.get(unit, {}) == expected, (source, channel)


@pytest.mark.parametrize("name", NETS)
def test_sources_are_units_that_feed_the_column(name: str) -> None:
    _, _, _, found = connected(name)
    for name_, layer in found.layers.items():
        pairs = set(zip(*(part.tolist() for part in found.feeding(name_)), strict=True))
        assert len(layer.sources) in (found.layers[name_].sources.shape[0],)
        for column, unit in enumerate(layer.sources.tolist()):
            assert (unit == -1) == layer.mixes_positions
            assert unit == -1 or (column, unit) in pairs


def test_every_operator_that_has_a_path_rule_is_followed_or_known_not_to_be() -> None:
    families, others = families_of([*path_rules.FUNCTIONS.values(), *path_rules.METHODS.values()])
    assert families == set(OPERATORS)
    assert others == NOT_FOLLOWED
    families, others = families_of(path_rules.MODULES.values())
    assert families == set(MODULES)
    assert others == {"<lambda>", "bilinear_module", "cell", "recurrent", "unpool_module"}


def families_of(rules: Iterable[Callable[..., Any]]) -> tuple[set[str], set[str]]:
    """The families of path rules, and the names of rules without one, or of what makes them."""
    alone = {rule for rule in rules if not path_rules.family_of(rule)}
    names = {rule.__qualname__.partition(".")[0] for rule in alone}
    return {path_rules.family_of(rule) for rule in rules} - {""}, names


NOT_FOLLOWED = {
    "as_pairs", "bilinear", "broadcasting", "deform_conv2d", "distance", "from_pairs", "from_parts", "grid_sample",
    "grouped_matmul", "integrate", "interpolated", "leak", "learned_leak", "multihead_function", "padded_sequence",
    "part", "part_written", "put", "roi_align", "roi_pool", "shifted", "short_time", "tensor_dot", "transform",
    "transform_several", "unpool", "writing",
}  # fmt: skip

# Per network: groups that could be cut out, each by the layers and channels in it.
GROUPS = {
    "residual": 6 + 4,
    "dense": 4 + 3,
    "shuffle": 8 + 4,
    "subpixel": 2 + 4,
    "excite": 6 + 2 + 4,
    "attention": 8 + 8 + 8 + 6,
    "written attention": 8 + 8 + 8 + 6,
    "flat": 4 + 8 + 4,
    "mixer": 5,
    "linearised": 6 + 6 + 6 + 6 + 6,
}


@pytest.mark.parametrize("name", GROUPS)
def test_no_more_units_are_coupled_than_must_be(name: str) -> None:
    _, _, _, found = connected(name)
    assert len({*found.group[1:].tolist()} - found.pinned.keys()) == GROUPS[name]


CUT = ["residual", "dense", "subpixel", "excite", "attention", "written attention", "flat", "mixer"]


@pytest.mark.parametrize("name", CUT)
def test_a_group_can_be_cut_out_of_all_weights_and_the_network_computes_the_same(name: str) -> None:
    _, model, x, found = connected(name)
    framed = {unit for frame in found.frames for unit in frame.flatten().tolist()}
    grouped = [layer for layer, units in found.layers.items() if units.groups > 1]  # would need other group sizes
    framed |= {unit for layer in grouped for unit in found.coupled(layer).tolist()}
    framed |= {unit for layer in grouped for unit in found.group[found.layers[layer].sources].tolist()}
    groups = sorted({*found.group[1:].tolist()} - found.pinned.keys() - framed)
    assert groups
    for group in groups:
        with_zeros, without = copy.deepcopy(model), copy.deepcopy(model)
        for layer, units in found.layers.items():
            columns = units.sources.clamp(min=0)
            gone = (found.group[columns] == group) & (columns > 0)
            dead = found.coupled(layer) == group
            _silence(with_zeros.get_submodule(layer), gone)
            _cut(without.get_submodule(layer), ~dead, ~gone)
        for parameter, (axis, units) in found.parameters.items():
            _keep(without, parameter, axis, found.group[units] != group)
        torch.testing.assert_close(without(x), with_zeros(x), rtol=1e-12, atol=1e-12)


def _columns_axis(module: Any) -> int:
    return 0 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1


def _silence(module: Any, columns: Tensor) -> None:
    if columns.any():
        module.weight.data.movedim(_columns_axis(module), 0)[columns] = 0


def _cut(module: Any, outputs: Tensor, columns: Tensor) -> None:
    if outputs.all() and columns.all():
        return
    axis = _columns_axis(module)
    weight = module.weight.data.index_select(axis, columns.nonzero().flatten())
    module.weight = nn.Parameter(weight.index_select(1 - axis, outputs.nonzero().flatten()))
    module.bias = nn.Parameter(module.bias.data[outputs])


def _keep(model: nn.Module, name: str, axis: int, kept: Tensor) -> None:
    way, _, last = name.rpartition(".")
    owner = model.get_submodule(way)
    tensor = getattr(owner, last).data.index_select(axis, kept.nonzero().flatten())
    if last in owner._buffers:
        owner._buffers[last] = tensor
    else:
        owner._parameters[last] = nn.Parameter(tensor)


def test_parameters_are_cut_where_their_units_are() -> None:
    _, _, _, found = connected("attention")
    assert set(found.parameters) == {"token", "place", "scale"}
    stream = found.coupled("embed")
    for name, axis in (("token", 2), ("place", 2), ("scale", 0)):
        at, units = found.parameters[name]
        assert at == axis
        assert torch.equal(found.group[units], stream)
    assert torch.equal(found.coupled("proj"), stream)


def test_parameters_with_more_positions_than_the_value_and_fixed_filters_leave_units_free() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.table = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Parameter(torch.randn(1, 4, 4, 4))
            self.register_buffer("blur", torch.ones(4, 1, 3, 3) / 9)

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(self.a(x), self.blur, padding=1, groups=4).mean((2, 3), keepdim=True) + self.table
            return self.b(x).mean((2, 3))

    found = connect(growfx.wrap(Net().eval(), torch.randn(2, 3, 4, 4)))
    units = found.layers["a"].outputs
    assert torch.equal(found.layers["b"].sources, units)
    assert not found.pinned.keys() & set(units.tolist())
    assert found.parameters["table"][0] == 1
    assert torch.equal(found.parameters["table"][1], units)
    assert found.parameters["blur"][0] == 0


def test_heads_stand_in_frames_and_queries_are_coupled_with_keys() -> None:
    for name in ("attention", "written attention"):
        _, _, _, found = connected(name)
        queries, keys, values = found.coupled("qkv").view(3, 2, 4)
        assert torch.equal(queries, keys)
        assert not set(queries.flatten().tolist()) & set(values.flatten().tolist())
        assert any(torch.equal(frame, queries) for frame in found.frames)
        assert any(torch.equal(frame, values) for frame in found.frames)


def test_a_head_has_its_queries_keys_and_values_and_products_are_shared_by_units() -> None:
    for name in ("attention", "written attention"):
        _, _, _, found = connected(name)
        groups = found.coupled("qkv").view(3, 2, 4)
        assert [head.tolist() for head in found.heads] == [groups[:, h].unique().tolist() for h in range(2)]
        assert len(found.products) == 2
        macs = {cost for cost, _ in found.products}
        assert len(macs) == 1
        assert all(set(shares.tolist()) <= set(groups.flatten().tolist()) for _, shares in found.products)
    plain = connect(growfx.wrap(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(1, 3)))
    assert (plain.heads, plain.products) == ((), ())


def test_multihead_attention_modules_are_followed_inside() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.attention(x, x, x, need_weights=False)[0].mean(1)

    found = connect(growfx.wrap(Net().eval(), torch.randn(2, 3, 5)))
    inner = found.layers["attention"]
    assert torch.equal(inner.sources, found.layers["embed"].outputs)
    assert torch.equal(found.layers["attention.out_proj"].sources, inner.outputs[16:])
    assert torch.equal(found.coupled("attention")[:8], found.coupled("attention")[8:16])


def test_what_is_not_understood_is_pinned_with_its_place() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cumsum(self.a(x), -1))

    found = connect(growfx.wrap(Net().eval(), torch.randn(2, 4)))
    assert all("cumsum" in found.pinned[group] for group in found.coupled("a").tolist())
    assert found.layers["b"].sources.tolist() == [-1] * 6
    assert "cumsum" in str(found)


def test_what_data_selects_and_what_works_on_it_is_pinned() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            best = x.mean(-1).topk(2, 1).indices
            kept = torch.where(x > 0, x, x.exp())
            return self.c(torch.gather(kept, 1, best[:, :, None].expand(-1, -1, 5)))

    found = connect(growfx.wrap(Net().eval(), torch.randn(2, 7, 4)))
    assert found.layers["c"].sources.tolist() == [-1] * 5
    assert set(found.coupled("b").tolist()) | set(found.coupled("c").tolist()) <= found.pinned.keys()
    assert not set(found.coupled("a").tolist()) & found.pinned.keys()


def test_units_begin_in_lists_of_images_and_where_tokens_are_embedded() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.a(torch.stack([image - 1 for image in images])).mean((2, 3))

    found = connect(growfx.wrap(Lists().eval(), ([torch.randn(3, 4, 4), torch.randn(3, 4, 4)],)))
    first, second = found.inputs.values()
    assert torch.equal(found.layers["a"].sources, first)
    assert torch.equal(found.group[second], first)
    words = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).eval()
    found = connect(growfx.wrap(words, torch.randint(9, (2, 3))))
    assert torch.equal(found.layers["1"].sources, found.inputs["0"])
    assert torch.equal(found.layers["3"].sources, found.layers["1"].outputs)


def test_layers_fed_by_constants_only_are_pinned() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.table, self.b = nn.Linear(4, 6), nn.Linear(2, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + self.table(torch.ones(2)))

    found = connect(growfx.wrap(Net().eval(), torch.randn(2, 4)))
    assert {*found.coupled("table").tolist(), *found.coupled("a").tolist()} <= found.pinned.keys()
    assert found.layers["table"].sources.tolist() == [0, 0]


def test_a_layer_used_twice_couples_what_it_is_fed_with() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shared = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.shared(self.a(x)), self.shared(self.b(x))

    found = connect(growfx.wrap(Net().eval(), torch.randn(2, 4)))
    assert torch.equal(found.coupled("a"), found.coupled("b"))
    assert torch.equal(found.layers["shared"].sources, found.layers["a"].outputs)


def test_norms_over_units_count_them() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    found = connect(growfx.wrap(model, torch.randn(2, 4)))
    assert found.counted.keys() == set(found.coupled("0").tolist())
    model[1] = nn.BatchNorm1d(6)
    assert not connect(growfx.wrap(model.eval(), torch.randn(2, 4))).counted


def test_units_without_a_path_are_dead_and_removable_once_their_whole_group_is() -> None:
    net, _, _, found = connected("residual")
    masks = {name: layer.mask.clone() for name, layer in net.layers.items()}
    masks["a"][1] = False  # the shortcut's channel 1; the branch still writes to it
    masks["b"][2] = False
    net.set_masks(masks)
    paths = path_products(net)
    assert {name: units.tolist() for name, units in found.dead_units(paths).items()} == {"a": [1], "b": [2]}
    removable = found.removable(paths)
    assert [name for name, cut in removable.items() if cut.any()] == ["b"]
    masks["c"][1] = False
    net.set_masks(masks)
    removable = found.removable(path_products(net))
    assert {name: cut.nonzero().flatten().tolist() for name, cut in removable.items() if cut.any()} == {
        "a": [1],
        "b": [2],
        "c": [1],
    }


def test_an_input_channel_that_no_active_edge_reads_is_dead() -> None:
    net, _, _, found = connected("flat")
    net.layers["a"].mask[:, 2] = False
    alive = found.alive(path_products(net))
    assert alive[found.inputs["x"]].tolist() == [True, True, False]
    assert found.pinned[int(found.inputs["x"][2])] == "it is an input of the network"


def test_the_same_is_found_on_the_meta_device() -> None:
    for name in ("windows", "attention"):
        _, model, x, found = connected(name)
        there = connect(growfx.wrap(copy.deepcopy(model).to("meta"), x.to("meta")))
        assert torch.equal(found.group, there.group)
        assert str(found) == str(there)


MODELS = [
    "resnet10t",
    "densenet121",
    "mobilenetv3_small_050",
    "convnext_atto",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/swin_t",
    "test_vit",
    "resnest14d",
]


@pytest.mark.parametrize("name", MODELS)
def test_every_column_of_a_library_model_has_a_source(name: str) -> None:
    with torch.device("meta"):
        net = growfx.wrap(growfx.create_model(name).eval())
    found = connect(net)
    assert set(found.layers) == set(net.layers)
    for layer, units in found.layers.items():
        assert bool(((units.sources > 0) & (units.sources < len(found.group))).all()), layer
    assert set(found.pinned.values()) == {"it is an input of the network", "it is an output of the network"}
