"""Narrower networks as masks, against networks that are narrower."""

import copy
import math

import pytest
import torch
from breadth import some
from connect_nets import NETS, Attention, Mixer, build
from torch import nn
from torch.nn import functional as F

import growfx
from growfx import methods
from growfx.errors import ConfigError
from growfx.passes.connect.interpreter import connect


def attached(net, density: float, **options):
    method = methods.create("small-dense", density=density, **options)
    method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=4, steps_per_epoch=2)
    return net


def plain(*widths: int) -> nn.Sequential:
    """A chain of convolutions and norms with a linear head; `widths` of its hidden layers."""
    torch.manual_seed(0)
    first, second, third = widths
    model = nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, bias=False),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * 9, third),
        nn.ReLU(),
        nn.Linear(third, 4),
    ).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return model


def cut(model: nn.Sequential, *widths: int) -> nn.Sequential:
    """The same chain with the first units of every layer only."""
    narrow, (first, second, third) = plain(*widths), widths
    rows = {0: first, 1: first, 3: second, 4: second, 7: third}
    columns = {3: first, 7: second * 9, 9: third}
    state = copy.deepcopy(model.state_dict())
    for key, value in state.items():
        layer = int(key.split(".")[0])
        value = value[: rows[layer]] if value.ndim and layer in rows else value
        state[key] = value[:, : columns[layer]] if value.ndim > 1 and layer in columns else value
    narrow.load_state_dict(state)
    return narrow


@pytest.mark.parametrize("width", [0.25, 0.5, 0.7])
def test_a_chain_computes_what_the_narrower_chain_does(width):
    model = plain(8, 12, 10)
    narrow = cut(model, *(math.ceil(width * n) for n in (8, 12, 10)))
    made = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, 8, 8, generator=made, dtype=torch.float64)
    net = growfx.wrap(model, x[:1])
    count = sum(p.numel() for p in narrow.parameters() if p.ndim > 1)
    attached(net, count / net.numel)
    assert net.nnz == count
    targets = torch.arange(6) % 4
    for mode in (True, True, False):  # two steps with batch statistics, then by their averages
        net.train(mode), narrow.train(mode)
        ours, theirs = net(x), narrow(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        for output, owner in ((ours, net), (theirs, narrow)):
            owner.zero_grad()
            F.cross_entropy(output, targets).backward()
            torch.optim.SGD([p for p in owner.parameters() if p.ndim > 1], lr=0.5).step()


def kept_units(net) -> dict:
    """Per layer, which output and which input units have an edge."""
    return {
        name: (layer.mask.flatten(1).any(1), layer.mask.transpose(0, 1).flatten(1).any(1))
        for name, layer in net.layers.items()
    }


def is_dense_between_kept_units(net) -> list[str]:
    """Layers that miss an edge between two of their kept units."""
    ragged = []
    for name, (out, into) in kept_units(net).items():
        mask = net.layers[name].mask
        full = (out[:, None] & into).view(*mask.shape[:2], *[1] * (mask.ndim - 2)).expand(mask.shape)
        if not torch.equal(full, mask):
            ragged.append(name)
    return ragged


@pytest.mark.parametrize("name", sorted(set(NETS) - {"mixer", "flat", "shuffle"}))
@pytest.mark.parametrize("density", some([0.25, 0.4, 0.8], lambda density: density == 0.4))
def test_coupled_units_stay_or_go_together_and_hardly_a_layer_is_ragged(name, density):
    model, x = build(name)
    net = attached(growfx.wrap(model, x), density)
    assert net.nnz == round(density * net.numel)
    connected = connect(net)
    kept: dict[int, set] = {}
    ragged = is_dense_between_kept_units(net)
    for layer, (out, into) in kept_units(net).items():
        units = connected.layers[layer]
        if layer in ragged:
            continue
        for group, there in zip(connected.coupled(layer).tolist(), out.tolist(), strict=True):
            kept.setdefault(group, set()).add(there)
        for source, there in zip(units.sources.tolist(), into.tolist(), strict=True):
            if source > 0:
                kept.setdefault(int(connected.group[source]), set()).add(there)
    # the one unit of which only a part of the edges is there may differ between its layers
    assert sum(len(found) > 1 for found in kept.values()) <= 1 + sum(frame.shape[0] for frame in connected.frames[:1])
    assert growfx.path_products(net, norm="identity").log_total > -math.inf


def test_heads_of_attention_stay_and_become_narrower_alike():
    torch.manual_seed(0)
    net = attached(growfx.wrap(Attention().double(), torch.randn(1, 3, 4, 4, dtype=torch.float64)), 0.3)
    rows = net.layers["qkv"].mask.any(1).view(3, 2, 4).sum(-1)
    assert rows.min() == rows.max()
    assert 0 < int(rows[0, 0]) < 4
    gate, value = net.layers["fc1"].mask.any(1).chunk(2)
    assert torch.equal(gate, value)


def test_inputs_and_outputs_stay_whole():
    net = attached(growfx.wrap(plain(8, 12, 10), torch.randn(1, 3, 8, 8, dtype=torch.float64)), 0.3)
    units = kept_units(net)
    assert units["0"][1].all()
    assert units["9"][0].all()


def test_more_density_only_adds_edges_unit_by_unit():
    before: dict[str, torch.Tensor] = {}
    net = whole = growfx.wrap(plain(8, 12, 10), torch.randn(1, 3, 8, 8, dtype=torch.float64))
    for density in torch.linspace(0.05, 1.0, 25).tolist():
        net = attached(copy.deepcopy(whole), density)
        assert net.nnz == round(density * net.numel)
        # a unit that is partly there is in the layer that makes it and in the one that it feeds
        assert len(is_dense_between_kept_units(net)) <= 2
        masks = {name: layer.mask.clone() for name, layer in net.layers.items()}
        assert all((masks[name] | ~mask).all() for name, mask in before.items())
        before = masks
    assert net.density == 1


class Tokens(Mixer):
    def __init__(self):
        super().__init__()
        self.embed, self.tokens, self.back = nn.Conv2d(3, 40, 2, stride=2), nn.Linear(36, 60), nn.Linear(60, 36)
        self.channels, self.head = nn.Linear(40, 40), nn.Linear(40, 3)


def test_layers_over_positions_are_thinned_at_random_to_the_square_of_the_width():
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        nets.append(attached(growfx.wrap(Tokens(), torch.randn(1, 3, 12, 12)), 0.25, seed=seed))
        assert nets[-1].nnz == round(0.25 * nets[-1].numel)
    assert nets[0].mask_digest() == nets[1].mask_digest() != nets[2].mask_digest()
    width = float(kept_units(nets[0])["channels"][1].sum()) / 40
    for name in ("tokens", "back"):
        assert nets[0].layers[name].density == pytest.approx(width**2, abs=0.05)


def test_a_density_below_one_unit_everywhere_is_refused_with_the_lowest_allowed():
    def net():
        return growfx.wrap(plain(8, 12, 10), torch.randn(1, 3, 8, 8, dtype=torch.float64))

    narrowest = 27 + 9 + 9 + 4
    numel = net().numel
    with pytest.raises(
        ConfigError, match=rf"`density` is 0\.01; the narrowest network, .* has {narrowest / numel:.4g}"
    ):
        attached(net(), 0.01)
    least = attached(net(), narrowest / numel)
    assert [int(out.sum()) for out, _ in kept_units(least).values()] == [1, 1, 1, 4]


def test_without_such_layers_the_seed_changes_nothing():
    masks = [
        attached(growfx.wrap(plain(8, 12, 10), torch.randn(1, 3, 8, 8, dtype=torch.float64)), 0.3, seed=seed)
        for seed in (0, 1)
    ]
    assert masks[0].mask_digest() == masks[1].mask_digest()


def test_sparse_aware_weights_are_those_of_the_narrower_fan_in():
    made = {}
    for init in ("dense", "sparse-aware"):
        net = growfx.wrap(plain(8, 12, 10), torch.randn(1, 3, 8, 8, dtype=torch.float64))
        made[init] = attached(net, 0.3, init=init).layers["3"]
    fan_in = made["dense"].mask.flatten(1).sum(1)
    scale = (72 / fan_in.clamp(min=1)).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(made["sparse-aware"].parameter.detach(), made["dense"].parameter.detach() * scale)
