"""Path products through a whole network: the score of every edge, present or absent.

The score of an edge i -> j is C_i G_j, with C_i the sum of path products from the input to i and G_j that from j to the
outputs: the gradient of the sum of the path graph's outputs with respect to the edge's magnitude (the PWMP score of
Yao & Dovrolis, arXiv 2509.25665, carried through every operator of a modern network).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from growfx.analysis.paths import PathProducts, PathVisits
from growfx.analysis.weight_layout import by_unit, joined_units
from growfx.distributed.sharded import require_whole
from growfx.errors import ConfigError, MaskError, TraceError
from growfx.masked.doors import as_masked_graph
from growfx.masked.present.storage import on_whole_weights
from growfx.notices import warn_once
from growfx.passes.path_products.interpreter import PathGraph
from growfx.passes.path_products.zeros import zero_factors
from growfx.recorded.inputs import Inputs, tensors_in

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["check_path_rules", "path_gradients", "path_products", "path_visits"]

# Layers that no path can cross whatever the weights, per recorded graph: found once, when a score is zero throughout.
_UNREACHED: weakref.WeakKeyDictionary[fx.Graph, frozenset[str]] = weakref.WeakKeyDictionary()


@on_whole_weights
def path_products(
    net: MaskedGraph,
    norm: str = "fold",
    power: float = 1,
    example_inputs: Tensor | Sequence[Any] | None = None,
) -> PathProducts:
    """Score every edge of every masked layer by the paths that run, or would run, through it.

    Args:
        net: a masked graph from `growfx.wrap`, in training or evaluation mode; nothing of it is changed.
        norm: "fold" counts a norm as its learned scale (over the running deviation for batch norm), "identity" as one.
        power: exponent of every learned factor (weights, norm and learned scales); averages stay as they are.
        example_inputs: a tensor or a tuple of the model's arguments (tensors, or lists and dicts of them); only
            shapes and kinds count, at batch 1; default: as recorded. Smaller is faster, but taps that only ever see
            padding score zero.

    Returns:
        Scores in float64 with one common scale; see `PathProducts`.

    Warns:
        GrowfxWarning: every product is zero, since a weight or scale is zero throughout; also in `notes`.

    Raises:
        UnsupportedOperatorError: an operator between input and output has no path rule.
        TraceError: the network was not recorded faithfully, is on the meta device, has no layer on a path, or a value
            is not finite.
        ConfigError: an unknown `norm` or a `power` that is not positive.

    Example:
        >>> import math
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> for parameter in model.parameters():
        ...     _ = torch.nn.init.ones_(parameter)
        >>> paths = growfx.path_products(growfx.wrap(model, torch.randn(1, 2)))
        >>> paths.scores["2"] * math.exp(paths.log_scale)  # two inputs reach each of the three units
        tensor([[2., 2., 2.]], dtype=torch.float64)
    """
    paths = path_gradients(net, norm=norm, power=power, example_inputs=example_inputs)
    if paths.notes and paths.log_total == -math.inf:
        warn_once(f"every path product is zero. {'; '.join(paths.notes)}", as_masked_graph(net, "").trace_report.notes)
    return paths


@on_whole_weights
def path_gradients(
    net: MaskedGraph,
    magnitudes: Mapping[str, Tensor] | None = None,
    *,
    norm: str = "fold",
    power: float = 1,
    example_inputs: Tensor | Sequence[Any] | None = None,
    unit_scales: bool = False,
    zeros_as_one: bool = False,
) -> PathProducts:
    """`path_products` over edge magnitudes of the caller's choice.

    With each unit's outgoing magnitudes normalised to one, ``magnitudes * scores`` are the expected visits of forward
    random walks; with incoming ones, of backward walks. With the masks themselves and ``unit_scales``, units are alive
    exactly when active edges connect them, whatever the weights.

    Args:
        net: a masked graph.
        magnitudes: layer name -> non-negative finite tensor of the weight's shape, used unchanged (no mask, no power);
            layers left out keep their own magnitudes.
        norm: as in `path_products`.
        power: as in `path_products`.
        example_inputs: as in `path_products`.
        unit_scales: count learned scales (LayerScale, gains) and unmasked weights as one.
        zeros_as_one: count a layer's weight (within its mask), a norm or a learned scale that is zero throughout as
            one, so that a network with a head or gains that start at zero has scores; the rest is not changed by it.

    Raises:
        MaskError: an unknown layer name, or magnitudes of another shape or outside [0, inf).
    """
    _check_options(norm, power)
    net = as_masked_graph(net, "growfx.path_products")
    _check_network(net)
    _check_values(net)
    chosen = _checked_magnitudes(net, magnitudes or {})
    given = _inputs(net, example_inputs)
    inputs, graph = given.values, net.graph_for(given, look_inside=True)
    run = PathGraph(
        net, graph, norm=norm, power=power, magnitudes=chosen, unit_scales=unit_scales, zeros_as_one=zeros_as_one
    )
    scores, off_path = _layers(run, inputs)
    return _facts(run, scores, off_path)


@on_whole_weights
def path_visits(net: MaskedGraph, *, zeros_as_one: bool = False) -> PathVisits:
    """Count how often paths visit each output unit of each masked layer, without scores of edges.

    Args:
        net: a masked graph.
        zeros_as_one: as in `path_gradients`.

    Raises:
        UnsupportedOperatorError: an operator between input and output has no path rule.
        TraceError: as in `path_products`.
    """
    net = as_masked_graph(net, "growfx.path_products")
    _check_network(net)
    _check_values(net)
    given = _inputs(net, None)
    run = PathGraph(net, net.graph_for(given, look_inside=True), zeros_as_one=zeros_as_one, visits=True)
    found, off_path = _layers(run, given.values)
    assert run.total is not None
    total = float(run.total.detach()) or 1.0
    return PathVisits({name: masses / total for name, masses in found.items()}, off_path)


@on_whole_weights
def check_path_rules(net: MaskedGraph, example_inputs: Tensor | Sequence[Any] | None = None) -> dict[str, str]:
    """Check that every operator on a path has a rule; returns layer name -> why no path crosses it.

    On the meta device shapes alone decide, so that networks of any size can be checked: there are no scores, and layers
    whose results nobody reads are not told from others.

    Args:
        net: a masked graph.
        example_inputs: as in `path_products`.

    Raises:
        UnsupportedOperatorError: an operator between input and output has no path rule.
        TraceError: as in `path_products`, values aside.
    """
    net = as_masked_graph(net, "growfx.path_products")
    _check_network(net)
    given = _inputs(net, example_inputs)
    return _layers(PathGraph(net, net.graph_for(given, look_inside=True)), given.values)[1]


def _layers(run: PathGraph, inputs: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Scores of the layers on a path, and why the others are off."""
    scores, empty = _scored(run, inputs)
    off_path = _off_path(run, scores, _unreached(run, inputs) if empty else frozenset())
    on_path = {name: score for name, score in scores.items() if name not in off_path}
    if not on_path:
        reasons = "; ".join(f"`{name}`: {reason}" for name, reason in list(off_path.items())[:5])
        raise TraceError(f"no masked layer lies on a path from input to output ({reasons}); nothing can be scored")
    return on_path, off_path


def _check_options(norm: str, power: float) -> None:
    if norm not in ("fold", "identity"):
        raise ConfigError(f"`norm` is {norm!r}; allowed are 'fold' and 'identity'")
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 < power < math.inf:
        raise ConfigError(f"`power` is {power!r}; give a positive number (1 or 2)")


def _check_network(net: MaskedGraph) -> None:
    if not net.layers:
        raise TraceError("the network has no masked layer, so there is no edge to score; wrap it without `exclude`")


def _check_values(net: MaskedGraph) -> None:
    for name, layer in net.layers.items():
        require_whole(
            layer.parameter, "paths multiply whole ones; call `net.unshard()` before and `net.reshard()` after"
        )
        if layer.parameter.is_meta:
            raise TraceError(
                f"layer `{name}` is on the meta device and has no values; move the network to a real device"
            )


def _checked_magnitudes(net: MaskedGraph, magnitudes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, magnitude in magnitudes.items():
        if name not in net.layers:
            raise MaskError(
                f"magnitudes for `{name}`, which is not a masked layer; allowed are the names in `net.layers`"
            )
        shape = net.layers[name].parameter.shape
        if magnitude.shape != shape:
            raise MaskError(
                f"magnitudes of `{name}` have shape {tuple(magnitude.shape)}; its weight has shape {tuple(shape)}"
            )
        if magnitude.dtype != torch.bool and not bool((magnitude >= 0).all() & torch.isfinite(magnitude).all()):
            raise MaskError(f"magnitudes of `{name}` are not all in [0, inf); give finite non-negative values")
    return dict(magnitudes)


def _inputs(net: MaskedGraph, example_inputs: Any) -> Inputs:
    """Inputs at batch 1; where they have no common batch (images in a list) as they are."""
    if example_inputs is None:
        return net.example(batch=1)
    try:
        given = net.inputs_like(example_inputs, batch=1)
    except TraceError as error:
        raise ConfigError(str(error)) from None
    tensors = list(tensors_in(given.values))
    if not tensors or any(item.numel() == 0 for item in tensors):
        kinds = ", ".join(type(item).__name__ for item in given.values)
        raise ConfigError(f"`example_inputs` holds {kinds}; give tensors with at least one sample")
    return given


def _scored(run: PathGraph, inputs: Sequence[Any]) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Run the path graph forward and backward.

    Returns layer name -> score (or paths through each unit), for layers that a gradient reached, and which of these are
    zero throughout.
    """
    cudnn = torch.backends.cudnn.flags(torch.backends.cudnn.enabled, benchmark=False, deterministic=True)
    precise = nullcontext() if run.device.type == "meta" else torch.autocast(run.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), cudnn, precise:
        run.run(inputs)
        assert run.total is not None
        if run.total.requires_grad:
            run.total.backward()
    scores: dict[str, Tensor] = {}
    empty: set[str] = set()
    for name in run.layers:
        gradients = _unit_gradients(run, name) if run.visits else _edge_gradients(run, name)
        if not gradients:
            continue
        scores[name] = gradients[0] if len(gradients) == 1 else torch.stack(gradients).sum(0)
        mass = 1.0 if scores[name].is_meta else float(scores[name].sum())
        if not math.isfinite(mass):
            raise TraceError(f"the scores of layer `{name}` are not finite; look for extreme weights or norm scales")
        if mass == 0:
            empty.add(name)
    return scores, frozenset(empty)


def _edge_gradients(run: PathGraph, name: str) -> list[Tensor]:
    return [leaf.grad for leaf in run.leaves.get(name, ()) if leaf.grad is not None]


def _unit_gradients(run: PathGraph, name: str) -> list[Tensor]:
    """Paths through each output unit: by its own factor, or all that cross its edges."""
    layer, crossed = run.layers[name], [leaf for leaf in run.leaves.get(name, ()) if leaf.grad is not None]
    own = run.unit_leaves.get(name)
    gradients = [] if own is None or own.grad is None else [own.grad]
    for leaf in crossed:
        rows = (by_unit(layer, values.detach(), by_output=True) for values in (leaf, cast(Tensor, leaf.grad)))
        gradients.append(torch.linalg.vecdot(*rows))
    return gradients


def _off_path(run: PathGraph, scores: Mapping[str, Tensor], unreached: frozenset[str]) -> dict[str, str]:
    """Why layers have no score."""
    reasons: dict[str, str] = {}
    for name in run.layers:
        if name in scores and name not in unreached:
            continue
        if name in run.leaves:
            nothing = "the recorded input left nothing to feed it; give one in which something is found"
            reasons[name] = nothing if name in run.unfed else "no path from the input to an output runs through it"
        elif name in run.ended_fed:
            reasons[name] = "it is fed only by what a selection by data (top-k, suppression) has picked"
        elif name in run.constant_fed:
            reasons[name] = "it is fed by constants only, not by the network's input"
        else:
            reasons[name] = "it is not used in evaluation mode"
    return reasons


def _unreached(run: PathGraph, inputs: Sequence[Any]) -> frozenset[str]:
    """Layers that no path crosses even with every edge present and every scale one."""
    if run.graph not in _UNREACHED:
        ones = {name: torch.ones_like(layer.mask, dtype=torch.float64) for name, layer in run.layers.items()}
        full = PathGraph(run.net, run.graph, norm="identity", magnitudes=ones, unit_scales=True)
        _UNREACHED[run.graph] = _scored(full, inputs)[1]
    return _UNREACHED[run.graph]


def _facts(run: PathGraph, scores: dict[str, Tensor], off_path: dict[str, str]) -> PathProducts:
    assert run.total is not None
    log_scale, total = run.exponent * math.log(2), float(run.total.detach())
    alive_in, alive_out = {}, {}
    for name, score in scores.items():
        sources, targets = _crossed_units(run, name, score)
        alive_in[name] = run.alive_in.get(name, sources)
        alive_out[name] = targets
    log_total = math.log(total) + log_scale if total > 0 else -math.inf
    zeros = zero_factors(run.net, run.silent) if run.silent else ()
    return PathProducts(scores, log_scale, log_total, off_path, alive_in, alive_out, zeros)


def _crossed_units(run: PathGraph, name: str, score: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output units of a layer with a path through one of the layer's own edges."""
    layer = run.layers[name]
    crossed = (score > 0).logical_and_(run.leaves[name][0].detach() > 0)
    return joined_units(layer, crossed)
