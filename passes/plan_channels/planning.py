"""Plan which whole units leave a network, so that it costs a given fraction of the dense one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from growfx.analysis.channel_plan import Budget, ChannelPlan
from growfx.errors import ConfigError
from growfx.masked.doors import as_masked_graph
from growfx.masked.present.storage import on_whole_weights
from growfx.passes.plan_channels.gain import SCORES, magnitudes, path_masses, taylor, unit_visits
from growfx.passes.plan_channels.options import PlanOptions
from growfx.passes.plan_channels.planner import ChannelPlanner

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["plan_channels"]


@torch.inference_mode(False)
@on_whole_weights
def plan_channels(
    net: MaskedGraph,
    budget: str | Budget,
    *,
    score: str = "paths",
    floor: float = 0.1,
    floors: Mapping[str, float] | None = None,
    round_to: int = 1,
    exclude: Sequence[str] = (),
    example_inputs: Any = None,
) -> ChannelPlan:
    """Plan which whole units leave `net` (channels, hidden units, heads), so that it costs a fraction of the dense one.

    Units that are coupled (by residual sums, gates, depthwise convolutions) leave together, heads of an attention and
    groups of a grouped convolution leave whole. Groups leave in the order of their gain over their cost, until the
    budget is met; then no further group fits into it. What a norm counts, what is an input or output and what the
    model's own code cannot do without stays, and the plan says why.

    Args:
        net: a masked network with values; nothing of it is changed. Units without edges leave first.
        budget: ``KIND=FRACTION`` of the dense network: "params" (parameters, and the weights of masked layers), "flops"
            (multiply-accumulates) or "time" (measured on this machine), and a fraction in (0, 1].
        score: what a group of units is worth: "paths" (how often a path, drawn in proportion to its product, visits
            it), "magnitude" (of its weights in and out) or "taylor" (weight times gradient: call `backward` before).
        floor: the fraction of like units that stays at least, and one.
        floors: glob pattern of layer names -> another such fraction.
        round_to: layers that lose units keep a multiple of this many.
        exclude: glob patterns of layers that keep all of their output units.
        example_inputs: as of `growfx.wrap`; costs are those of this size. Default: as recorded.

    Raises:
        ConfigError: a budget that is malformed or cannot be reached (naming the least that can, and what holds it up),
            a network without units that can leave, and options that do not fit the network.
        TraceError: a network without values, or one that could not be followed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> net = growfx.wrap(model, torch.randn(1, 8))
        >>> plan = growfx.plan_channels(net, "flops=0.5")
        >>> plan.removed, plan.share("flops")
        (16, 0.5)
        >>> net.set_masks(plan.masks(net))
        >>> growfx.unwrap(net, compact=True)[0]
        Linear(in_features=8, out_features=16, bias=True)
    """
    net = as_masked_graph(net, "growfx.plan_channels")
    wanted = Budget.parse(budget)
    if score not in SCORES:
        allowed = ", ".join(f"`{name}`" for name in SCORES)
        raise ConfigError(f"`score` is {score!r}; allowed: {allowed}")
    names = (exclude,) if isinstance(exclude, str) else exclude
    if not isinstance(names, Iterable) or not isinstance(floors or {}, Mapping):
        raise ConfigError(f"`exclude` is {exclude!r} and `floors` {floors!r}; allowed: names, and a mapping of names")
    options = PlanOptions(floor, dict(floors or {}), round_to, tuple(names))
    gradients = _gradients(net) if score == "taylor" else {}
    paths = unit_visits(net) if score == "paths" else None
    stays = {} if paths is None else {name: f"`{name}` is on no path" for name in paths.off_path}
    planner = ChannelPlanner(net, options, example_inputs=example_inputs, stays=stays, timed=wanted.kind == "time")
    if paths is not None:
        gains = path_masses(planner.units, paths)
    else:
        gains = magnitudes(net, planner.units) if score == "magnitude" else taylor(net, planner.units, gradients)
    return planner.plan(wanted, gains, score, planner.absent())


def _gradients(net: MaskedGraph) -> dict[str, Tensor]:
    """The gradients that the masked weights have.

    Raises:
        ConfigError: none has one.
    """
    found = {name: x.parameter.grad for name, x in net.layers.items() if x.parameter.grad is not None}
    if not found:
        raise ConfigError(
            '`score` = "taylor" expects gradients of the loss in the masked weights, and there are none; call '
            "`loss.backward()` before, or use another score"
        )
    return found
