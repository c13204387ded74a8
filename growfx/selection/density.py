"""Distribute a total density over the layers, and draw random masks of exactly those counts.

Densities are the fraction of weights that are active (1 - sparsity), over the layers given.

* `"erk"`: Erdos-Renyi-kernel (Evci et al., RigL, ICML 2020, app. A): density of a layer proportional to
  `sum(shape) / prod(shape)` over all dimensions; layers that would exceed 1 become dense, the rest is
  solved again.
* `"er"`: Erdos-Renyi (Mocanu et al., SET, 2018): the same with the two channel dimensions alone.
* `"uniform"`: every layer the same density. Deviation from RigL: the first layer is not kept dense, so
  that the total is what was asked for.

Integer counts sum to exactly `round(density * total)` (largest remainder, a layer never above its size).
"""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from growfx.errors import ConfigError
from growfx.selection.edge_keys import EdgeKeys

__all__ = ["DISTRIBUTIONS", "check_density", "layer_counts", "layer_densities", "random_masks"]

Shapes = Mapping[str, tuple[int, ...]]


def _erk_share(shape: tuple[int, ...]) -> float:
    return sum(shape) / math.prod(shape)


def _er_share(shape: tuple[int, ...]) -> float:
    return sum(shape[:2]) / math.prod(shape[:2])


def _uniform_share(shape: tuple[int, ...]) -> float:
    return 1.0


DISTRIBUTIONS: Final[Mapping[str, Callable[[tuple[int, ...]], float]]] = {
    "erk": _erk_share,
    "er": _er_share,
    "uniform": _uniform_share,
}


def check_density(density: float, option: str = "density") -> float:
    """Return `density` as a float; anything but a number in (0, 1] is a `ConfigError` naming `option`."""
    number = isinstance(density, numbers.Real) and not isinstance(density, bool)  # numpy's scalars are some
    if not number or not 0.0 < density <= 1.0:
        raise ConfigError(f"`{option}` is {density!r}; allowed is a number in (0, 1]")
    return float(density)


def layer_densities(shapes: Shapes, density: float, distribution: str = "erk") -> dict[str, float]:
    """Return the real-valued density of each layer, each in [0, 1], with `density` over all of them.

    `shapes` maps layer names to weight shapes. Raises `ConfigError` for a density outside (0, 1] or an
    unknown distribution.
    """
    density = check_density(density)
    if distribution not in DISTRIBUTIONS:
        allowed = ", ".join(f"`{name}`" for name in DISTRIBUTIONS)
        raise ConfigError(f"`distribution` is {distribution!r}; allowed are {allowed}")
    share = DISTRIBUTIONS[distribution]
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    shares = {name: share(tuple(shapes[name])) for name, size in sizes.items() if size}
    budget = density * sum(sizes.values())
    result = dict.fromkeys(shapes, 0.0)
    while shares:
        scale = budget / math.fsum(shares[name] * sizes[name] for name in shares)
        largest = max(shares.values())
        if scale * largest < 1.0:
            return result | {name: scale * value for name, value in shares.items()}
        full = [name for name, value in shares.items() if value == largest]
        for name in full:
            result[name] = 1.0
            budget = max(budget - sizes[name], 0.0)
            del shares[name]
    return result


def layer_counts(shapes: Shapes, density: float, distribution: str = "erk") -> dict[str, int]:
    """Return the number of active weights of each layer; they sum to `round(density * total)`.

    Largest remainder: what flooring leaves over goes to the layers with the largest fractional parts (equal
    ones by name), so the result does not depend on the order of `shapes`. Errors as `layer_densities`.
    """
    densities = layer_densities(shapes, density, distribution)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    wanted = {name: min(densities[name] * sizes[name], float(sizes[name])) for name in sizes}
    counts = {name: math.floor(value) for name, value in wanted.items()}
    missing = round(density * sum(sizes.values())) - sum(counts.values())
    by_remainder = sorted(sizes, key=lambda name: (counts[name] - wanted[name], name))
    step = 1 if missing > 0 else -1
    while missing:
        # more than one turn happens only when layers are full (or empty) already
        for name in by_remainder if step > 0 else reversed(by_remainder):
            if missing and 0 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                missing -= step
    return counts


def random_masks(shapes: Shapes, density: float, distribution: str = "erk", seed: int = 0) -> dict[str, Tensor]:
    """Draw bool masks (CPU, the given shapes) with exactly `layer_counts` active weights each.

    Within a layer every subset of that size is equally likely. A layer's mask depends on `seed`, its
    name, its shape and its count alone. Errors as `layer_densities`.
    """
    counts = layer_counts(shapes, density, distribution)
    keys = EdgeKeys(seed, "random mask")
    return {name: _random_mask(keys, name, tuple(shapes[name]), counts[name]) for name in shapes}


def _random_mask(keys: EdgeKeys, name: str, shape: tuple[int, ...], count: int) -> Tensor:
    size = math.prod(shape)
    if count in (0, size):
        return torch.full(shape, count > 0, dtype=torch.bool, device="cpu")
    order = np.argpartition(keys.uniform(name, 0, size), count - 1)
    mask = np.zeros(size, dtype=bool)
    mask[order[:count]] = True
    return torch.from_numpy(mask).reshape(shape)
