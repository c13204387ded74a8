"""What growth pays for edges: their number, or the multiply-accumulates they cost in a forward pass.

A weight of a convolution at 32x32 is applied at 1,024 positions, one of a head at a single one. Where time is what a
user pays, an edge costs as many multiply-accumulates as it has positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torch import Tensor

from growfx.analysis.cost import forward_cost
from growfx.errors import ConfigError
from growfx.masked.isolation import undisturbed
from growfx.methods.scope import Scope

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["PRICES", "Price", "price_of"]

PRICES: Final = ("weights", "flops")


@dataclass(frozen=True)
class Price:
    """The price of an edge of each layer.

    `per_edge`: multiply-accumulates for one sample, by layer; None where every edge counts as one.
    """

    per_edge: Mapping[str, float] | None = None

    @property
    def counts_weights(self) -> bool:
        """Whether every edge has the price of one."""
        return self.per_edge is None

    def of(self, name: str) -> float:
        """Return the price of an edge of the layer `name`."""
        return 1.0 if self.per_edge is None else self.per_edge[name]

    def total(self, scope: Scope) -> float:
        """Return what all edges cost together, of the layers that `scope` counts."""
        return sum(self.of(name) * layer.numel for name, layer in scope.budget.items())

    def spent(self, scope: Scope, masks: Mapping[str, Tensor] | None = None) -> float:
        """Return what the active edges cost, with `masks` in the place of those that some layers have."""
        changed = masks or {}
        counts = {
            name: int(changed[name].sum()) if name in changed else layer.nnz for name, layer in scope.budget.items()
        }
        return sum(self.of(name) * count for name, count in counts.items())

    def share(self, scope: Scope) -> float:
        """Return what the active edges cost over what all edges would."""
        total = self.total(scope)
        return self.spent(scope) / total if total else 1.0

    def per_price(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the scores over the prices of their edges."""
        if self.per_edge is None:
            return scores
        return {name: score / self.per_edge[name] for name, score in scores.items()}

    def cheapest(self, scope: Scope) -> float | None:
        """Return the price of the cheapest edge that is absent and may grow; None where there is none."""
        absent = [self.of(name) for name, layer in scope.layers.items() if layer.nnz < layer.numel]
        return min(absent, default=None)


def price_of(option: str, net: MaskedGraph, scope: Scope) -> Price:
    """Return the price that the option `price` ("weights" or "flops") means for `net`.

    Raises `ConfigError` where the multiply-accumulates of a layer that may grow cannot be counted, naming the operator
    that uses its weight.
    """
    if option == "weights":
        return Price()
    with undisturbed(net):
        counted = forward_cost(net)
    unknown = [name for name in scope.names if counted.layers[name] <= 0]
    if unknown:
        name = unknown[0]
        operator = counted.uncounted.get(name, "no operator of an evaluation forward pass")
        raise ConfigError(
            f'`price` = "flops" expects layers whose multiply-accumulates can be counted (convolutions, linear layers, '
            f"matrix products), got `{name}`, whose weight is used by {operator}; exclude that layer from the masks "
            '(`growfx.wrap(..., exclude=...)`), or set `price` = "weights"'
        )
    return Price({name: counted.layers[name] / layer.numel for name, layer in net.layers.items()})
