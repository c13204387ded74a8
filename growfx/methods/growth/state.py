"""The state of one growth: what it works on, its clock, its trace and the rounds it may go back to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from growfx.analysis.paths import PathProducts
from growfx.masked.layers import MaskedLayer
from growfx.masked.optimizers import StepWatch
from growfx.methods.attached import Attached
from growfx.methods.growth.newborn import Births
from growfx.methods.growth.price import Price
from growfx.methods.growth.snapshots import Origin, Snapshot
from growfx.methods.scope import Scope
from growfx.methods.sign_in import SignIn
from growfx.options import TrainOptions

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["Growth"]


@dataclass
class Growth(Attached):
    """One growth under way.

    Attributes:
        net, optimizer: what the method is attached to.
        scope: the layers that may grow, and what densities count.
        steps_per_epoch: optimizer steps; `steps` counts those of the round under way.
        trace: one entry a round, see `Growing.trace`.
        snapshots: rounds that may be gone back to, by number.
        gradients: dense gradients of the last step of a round that awaits its report, by layer with absent edges;
            empty otherwise.
        origin: the network before the seed was drawn, if the final training is to start from it.
        initial: the network as it was before the seed was drawn, where new edges start from its weights.
        tools: what the method found out about the network and can find out again, by name; not in its state.
        options: of the run, None in another loop. finished: the final training of a run is over.
        first_epochs: length of the first round, in which the seed is trained.
        price: what edges are paid in. births: when each edge was grown.
        cohort_gradients: of the last step of a round that awaits its report, the sum of gradient magnitudes over the
            edges of each birth; empty where there were none.
        sign_in: trains the weights as products, None where that is off.
    """

    net: MaskedGraph
    optimizer: Optimizer
    scope: Scope
    steps_per_epoch: int
    steps: int = 0
    growing: bool = True
    stop_reason: str = ""
    operating_round: int | None = None
    trace: list[dict[str, Any]] = field(default_factory=list)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    origin: Origin | None = None
    initial: Origin | None = None
    tools: dict[str, Any] = field(default_factory=dict)
    options: TrainOptions | None = None
    finished: bool = False
    first_epochs: int = 1
    price: Price = field(default_factory=Price)
    births: Births = field(default_factory=Births)
    cohort_gradients: list[float] = field(default_factory=list)
    sign_in: SignIn | None = None

    def __post_init__(self) -> None:
        self.watch = StepWatch(self.optimizer, [layer.trained for layer in self.net.layers.values()])

    def absent(self, paths: PathProducts) -> dict[str, Tensor]:
        """Return the edges that growth chooses from: absent ones of layers that some path crosses, bool."""
        return {name: ~self.net.layers[name].mask for name in paths.scores}

    def priced(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return scores per price of an edge; those given where weights are counted."""
        return self.price.per_price(scores)

    @property
    def unfilled(self) -> dict[str, MaskedLayer]:
        """Layers with absent edges."""
        return {name: layer for name, layer in self.net.layers.items() if layer.nnz < layer.numel}
