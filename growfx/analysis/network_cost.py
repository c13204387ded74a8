"""What one forward pass of a masked network costs, layer by layer, dense and under its masks.

Costs are multiply-accumulates of one sample in evaluation mode. Counted are convolutions, linear layers, recurrences,
bilinear forms and the products of attention; biases, norms, activations and pooling are not (`growfx.analysis.cost`
has the conventions).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from growfx.analysis.cost import ONE_AT_A_TIME, forward_cost
from growfx.masked.doors import as_masked_graph
from growfx.masked.isolation import undisturbed
from growfx.masked.present.storage import on_whole_weights

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["Cost", "LayerCost", "cost"]


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates of one masked layer: `dense` with every weight active, `sparse` under its mask."""

    dense: float
    sparse: float


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one sample's forward pass; prints as a table.

    Attributes:
        layers: by masked layer, in data-flow order; 0 for layers that evaluation does not use.
        rest: of everything that no mask touches.
    """

    layers: Mapping[str, LayerCost]
    rest: float

    @property
    def dense(self) -> float:
        """Those of the whole network with every weight active."""
        return sum(layer.dense for layer in self.layers.values()) + self.rest

    @property
    def sparse(self) -> float:
        """Those of the whole network under its masks."""
        return sum(layer.sparse for layer in self.layers.values()) + self.rest

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "layers": {name: {"dense": x.dense, "sparse": x.sparse} for name, x in self.layers.items()},
            "rest": self.rest,
            "dense": self.dense,
            "sparse": self.sparse,
        }

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [(name, layer.dense, layer.sparse) for name, layer in self.layers.items()]
        rows += [("not masked", self.rest, self.rest), ("whole network", self.dense, self.sparse)]
        shown = [(name, f"{dense:,.0f}", f"{sparse:,.0f}") for name, dense, sparse in rows]
        headers = ("multiply-accumulates of", "dense", "sparse")
        return tabulate(shown, headers, disable_numparse=True, colalign=("left", "right", "right"))


@on_whole_weights
def cost(net: MaskedGraph, example_inputs: Any = None) -> Cost:
    """Count the multiply-accumulates of one sample's forward pass under the masks that `net` has now.

    A layer's sparse cost is its dense cost times its density. The network, its modes, its buffers and the global
    random generators are left as they were.

    Args:
        net: a masked network.
        example_inputs: as of `growfx.wrap`, of any batch size; default: those it was wrapped with.

    Raises:
        ConfigError: not a masked network.
        TraceError: the network cannot be called with `example_inputs`.

    Example:
        >>> import torch, growfx
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), density=0.5)
        >>> cost = growfx.cost(net)
        >>> cost.dense, cost.sparse
        (8.0, 4.0)
    """
    net = as_masked_graph(net, "growfx.cost")
    with ONE_AT_A_TIME, undisturbed(net):
        counted = forward_cost(net, example_inputs)
    layers = {
        name: LayerCost(counted.layers[name], counted.layers[name] * layer.density)
        for name, layer in net.layers.items()
    }
    return Cost(layers, counted.rest)
