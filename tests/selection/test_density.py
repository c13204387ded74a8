"""Per-layer densities, exact counts and random masks."""

import math

import numpy as np
import pytest
import torch
from error_facts import facts
from hypothesis import given, settings
from hypothesis import strategies as st

from growfx.errors import ConfigError
from growfx.selection.density import DISTRIBUTIONS, check_density, layer_counts, layer_densities, random_masks
from growfx.selection.edge_keys import EdgeKeys


def wide_resnet(depth: int, width: int) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Weight shapes and output positions of a CIFAR wide ResNet with 1x1 shortcuts in each first block."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (16, 3, 3, 3)}
    positions = {"conv1": 32 * 32}
    channels = 16
    for group, out in enumerate((16 * width, 32 * width, 64 * width)):
        for block in range((depth - 4) // 6):
            name = f"block{group + 1}.{block}"
            shapes |= {f"{name}.conv1": (out, channels, 3, 3), f"{name}.conv2": (out, out, 3, 3)}
            if block == 0:
                shapes[f"{name}.shortcut"] = (out, channels, 1, 1)
            channels = out
            positions |= dict.fromkeys(list(shapes)[len(positions) :], (32 >> group) ** 2)
    return shapes | {"fc": (10, channels)}, positions | {"fc": 1}


def test_erk_reproduces_the_published_scale_and_dense_layers_of_wrn_22_2():
    shapes, _ = wide_resnet(22, 2)
    assert len(shapes) == 23
    assert sum(map(math.prod, shapes.values())) == 1_076_912
    published = {
        0.01: (3.3738, 0),
        0.05: (17.3424, 3),
        0.1: (35.9315, 4),
        0.2: (75.6010, 5),
        0.5: (209.7668, 12),
    }
    for density, (scale, dense) in published.items():
        got = layer_densities(shapes, density)
        free = next(name for name in shapes if got[name] < 1)
        # the reference floors each layer's count before solving, hence the 0.1 %
        assert got[free] * math.prod(shapes[free]) / sum(shapes[free]) == pytest.approx(scale, rel=1e-3)
        assert sum(value == 1.0 for value in got.values()) == dense


def test_erk_reproduces_the_published_densities_of_single_layers():
    shapes, _ = wide_resnet(22, 2)
    got = layer_densities(shapes, 0.2)
    assert got["block1.0.conv1"] == pytest.approx(0.8859, abs=2e-4)
    assert got["block1.0.conv2"] == pytest.approx(0.5742, abs=2e-4)
    assert got["block3.1.conv1"] == pytest.approx(0.1343, abs=2e-4)
    dense = {name for name, value in layer_densities(shapes, 0.1).items() if value == 1.0}
    assert dense == {"conv1", "block1.0.shortcut", "block2.0.shortcut", "fc"}


@pytest.mark.parametrize(
    ("distribution", "fractions"),
    [
        ("erk", {0.05: 0.0881, 0.1: 0.1735, 0.2: 0.3521, 0.5: 0.7282}),
        ("er", {0.05: 0.0887, 0.1: 0.1759, 0.5: 0.7270}),
    ],
)
def test_distributions_reproduce_the_published_inference_cost_of_wrn_22_2(distribution, fractions):
    shapes, positions = wide_resnet(22, 2)
    dense = sum(math.prod(shapes[name]) * positions[name] for name in shapes)
    for density, fraction in fractions.items():
        counts = layer_counts(shapes, density, distribution)
        assert sum(counts[name] * positions[name] for name in shapes) / dense == pytest.approx(fraction, abs=6e-4)


layer_shapes = st.dictionaries(
    st.text("abcdef.", min_size=1, max_size=6),
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(layer_shapes, st.floats(1e-6, 1.0), st.sampled_from(sorted(DISTRIBUTIONS)))
def test_counts_are_exact_and_within_each_layer_whatever_the_order(shapes, density, distribution):
    counts = layer_counts(shapes, density, distribution)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(counts.values()) == round(density * sum(sizes.values()))
    assert all(0 <= counts[name] <= sizes[name] for name in shapes)
    backwards = dict(reversed(list(shapes.items())))
    assert layer_counts(backwards, density, distribution) == counts


def test_uniform_gives_every_layer_the_same_density():
    shapes, _ = wide_resnet(22, 2)
    assert set(layer_densities(shapes, 0.3, "uniform").values()) == {0.3}


def test_random_masks_have_exact_counts_and_do_not_depend_on_the_other_layers():
    shapes, _ = wide_resnet(16, 1)
    masks = random_masks(shapes, 0.07, "erk", seed=5)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == layer_counts(shapes, 0.07)
    assert all(mask.dtype == torch.bool and mask.shape == shapes[name] for name, mask in masks.items())
    backwards = random_masks(dict(reversed(list(shapes.items()))), 0.07, "erk", seed=5)
    assert all(torch.equal(masks[name], backwards[name]) for name in shapes)
    assert not torch.equal(masks["block3.0.conv1"], random_masks(shapes, 0.07, "erk", seed=6)["block3.0.conv1"])


def test_random_masks_choose_every_edge_equally_often():
    drawn = torch.zeros(4, 5)
    for seed in range(2000):
        drawn += random_masks({"w": (4, 5)}, 0.25, "uniform", seed)["w"]
    # 2000 draws of 5 out of 20: standard deviation of a count is 19.4
    assert (drawn / 2000 - 0.25).abs().max() < 4.5 * 19.4 / 2000


def test_density_one_is_all_ones():
    assert all(mask.all() for mask in random_masks({"a": (3, 4), "b": (7,)}, 1.0).values())


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan"), float("inf"), True, "0.1"])
def test_a_density_outside_its_range_is_refused_by_name(density):
    with pytest.raises(ConfigError, match=facts("`max_density`", repr(density), "(0, 1]")):
        check_density(density, "max_density")
    with pytest.raises(ConfigError, match="`density`"):
        layer_counts({"w": (2, 2)}, density)


def test_an_unknown_distribution_names_the_allowed_ones():
    with pytest.raises(ConfigError, match=facts("`distribution`", "erdos", "`erk`", "`er`", "`uniform`")):
        layer_densities({"w": (2, 2)}, 0.5, "erdos")


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_masks_of_one_seed_are_nested_and_those_of_the_smallest_keys(size):
    order = np.argsort(EdgeKeys(3, "random mask").uniform("w", 0, size))
    before = torch.zeros(size, dtype=torch.bool)
    for count in sorted({1, 2, 3, size // 2, size - 1, size}):
        mask = random_masks({"w": (size,)}, count / size, "uniform", 3)["w"]
        assert set(mask.nonzero().flatten().tolist()) == set(order[:count].tolist())
        assert not (before & ~mask).any()
        before = mask
