"""PWMPR: grow a sparse seed by path products until accuracy stops paying for density.

Yao & Dovrolis, "Growing Winning Subnetworks, Not Pruning Them" (arXiv 2509.25665). New edges are drawn at random in
proportion to their path score, so that growth does not pile up on bottlenecks. Rounds, stop and final training are
those of all growth methods (`growfx.methods.growth.rounds`).

What the paper leaves open is decided here: one edge is one scalar weight; layers that no path crosses stay
dense and are counted; the draw is without replacement, over all layers at once; optimizer state is kept while
growing and cleared when an earlier round is put back. `PWMPR` lists where its defaults leave the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from growfx.analysis.paths import PathProducts
from growfx.methods.growth.rounds import Growing
from growfx.methods.growth.snapshots import DRAWS, counted_where_zero
from growfx.methods.growth.state import Growth
from growfx.options import option
from growfx.passes.path_products.products import path_gradients
from growfx.selection.choose import draw, top
from growfx.selection.edge_keys import EdgeKeys
from growfx.selection.result import Selection

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["PWMPR", "PathGrowth"]


@dataclass(frozen=True)
class PathGrowth(Growing):
    """Growth where absent edges have large path scores; options as in `Growing`, and

    Where every path product is zero (a head or gain that starts at zero), the number of paths is the score.

    Attributes:
        norm: what a norm layer counts in a path, as in `growfx.path_products`: "fold" or "identity".
        power: exponent of the magnitudes in a path, as in `growfx.path_products`.
        draw: "sampled" draws in proportion to the score, "top" takes the largest scores. An edge of score 0, which no
            path reaches, is never chosen.
    """

    reads_gradient: ClassVar[bool] = False

    norm: str = option("fold", choices=("fold", "identity"))
    power: float = option(1.0, low=0, high=8, open_low=True)
    draw: str = option("sampled", choices=DRAWS)

    def _paths(self, net: MaskedGraph) -> PathProducts:
        return counted_where_zero(net, path_gradients(net, norm=self.norm, power=self.power))

    def _by_score(self, growth: Growth, paths: PathProducts, count: int, keys: EdgeKeys) -> Selection:
        """Return `count` of the absent edges by score over price, or as many as some path reaches."""
        scores, absent = growth.priced(paths.scores), growth.absent(paths)
        if self.draw == "sampled":
            return draw(scores, count, keys, absent)
        reached = {name: score > 0 for name, score in scores.items()}
        return top(scores, count, keys, {name: absent[name] & mask for name, mask in reached.items()})


@dataclass(frozen=True)
class PWMPR(PathGrowth):
    """Growth by path products with a stop at the plateau; options as in `PathGrowth`.

    Deviations of the default options from the paper, as far as it is known:

    1. in `growfx.train` the seed is trained for as long as the final training, not for a short round; `growth_rounds` =
       "published" takes rounds that are alike.
    2. the curve is an average over logistic, power law and two-step curves by their evidence, not a logistic
       (`growfx.methods.growth.plateau`).
    3. growth goes back to the earliest round that is good enough under the last fit, where the paper goes on from the
       last one.
    4. rounds anneal their learning rate and are scored by averaged weights, so that their accuracies compare.
    """

    name: ClassVar[str] = "pwmpr"
    needs_whole: ClassVar[str] = ""

    def _grown(self, growth: Growth, paths: PathProducts, count: int, keys: EdgeKeys) -> Mapping[str, Tensor]:
        new = self._by_score(growth, paths, count, keys).masks
        return {name: growth.net.layers[name].mask | new[name] for name in paths.scores}
