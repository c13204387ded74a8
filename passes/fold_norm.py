"""Fold batch norms into the convolutions and linear layers before them: fewer operations, the same outputs.

In evaluation mode a batch norm with running statistics is one factor and one summand per channel. Where it reads
nothing but the output of one layer, and nothing else reads that, both go into the layer's weight and bias. Exact up to
rounding; the sparsity of the weight stays (a weight of zero stays +0.0, a scale of zero empties a row).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from growfx.compaction.folded_norm import folding_refusal, without_norm
from growfx.errors import TraceError
from growfx.masked.present.storage import on_whole_weights
from growfx.passes.mask.swap import unwrap
from growfx.passes.operators.classes import APPLIED, row_of
from growfx.passes.trials.comparison import Trial, difference, example_of, trials_in_types_of, working_copy
from growfx.passes.trials.precision import outputs_of
from growfx.passes.trials.result import PassResult

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["FoldedNorms", "fold_norm"]

_EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class FoldedNorms(PassResult[str]):
    """A model with norms folded into layers.

    Attributes:
        net: a plain model of the original class in evaluation mode; folded norms are `nn.Identity`, or the activation
            they contain.
        folded: norm -> the layer that took it over.
        kept: norm -> why it stays.
        largest_error: of the outputs, over the largest output.
    """

    folded: dict[str, str]
    kept: dict[str, str]
    largest_error: float


@torch.inference_mode(False)
@on_whole_weights
def fold_norm(net: MaskedGraph, example_inputs: Any = None) -> FoldedNorms:
    """Fold batch norms into the layers before them; `net` is not changed.

    Args:
        net: a masked network with values.
        example_inputs: inputs to compare outputs on, in the forms of `growfx.wrap`; default: as recorded.

    Raises:
        TraceError: the network could not be followed, has no values, or does not run on the inputs.
    """
    model = unwrap(net).eval()
    if any(tensor.is_meta for tensor in model.parameters()):
        raise TraceError("the network is on the meta device, so its norms have no values to fold; load them first")
    example = example_of(net, example_inputs)
    graph = net.graph_for(example, look_inside=True)
    work, trials = working_copy(model, example)
    pairs, kept = _pairs(work, graph, trials)
    for norm, layer in list(pairs.items()):
        weight: Any = model.get_submodule(layer).weight
        if weight.dtype not in _EXACT:
            kept[norm] = f"its factors would be rounded to the {weight.dtype} of `{layer}`"
            del pairs[norm]
    all_at_once = copy.deepcopy(work)
    for norm, layer in pairs.items():
        _fold(all_at_once, norm, layer)
    folded = pairs
    if difference(all_at_once, trials)[1]:
        folded = {norm: layer for norm, layer in pairs.items() if _fits(work, norm, layer, trials, kept)}
    own = trials_in_types_of(example, model, trials)
    for norm, layer in folded.items():
        _fold(model, norm, layer)
    error, problem = difference(model, own)
    if problem:
        raise TraceError(f"the model with folded norms computes something else: {problem}")
    return FoldedNorms(model, bool(folded), _account(folded, kept, error), folded, kept, error)


def _account(folded: dict[str, str], kept: dict[str, str], error: float) -> str:
    lines = [f"{norm} -> {layer}" for norm, layer in folded.items()]
    lines += [f"{norm} stays: {reason}" for norm, reason in kept.items()]
    return "\n".join([*lines, f"{len(folded)} norms folded; largest error {error:.1e}"])


def _pairs(model: nn.Module, graph: fx.Graph, trials: Sequence[Trial]) -> tuple[dict[str, str], dict[str, str]]:
    """Norms and the layers that could take them over, and why other norms stay."""
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    modules: dict[str, Any] = dict(model.named_modules())
    axes = _output_axes(model, trials)
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    pairs: dict[str, str] = {}
    kept: dict[str, str] = {}
    for node in graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(norm, _BatchNorm):
            name, source = str(node.target), node.args[0] if node.args else None
            reason = folding_refusal(norm) or ("it is used several times" if calls[name] > 1 else "")
            if not reason:
                reason = _layer_reason(modules, source, calls, uses, axes)
            if reason:
                kept[name] = reason
            else:
                pairs[name] = str(source.target)  # type: ignore[union-attr]
    for name, norm in modules.items():
        if isinstance(norm, _BatchNorm) and name not in pairs and name not in kept:
            seen = any(str(node.target).startswith(f"{name}.") for node in graph.nodes if node.op == "get_attr")
            kept[name] = f"a `{type(norm).__name__}` has its own forward" if seen else "evaluation never runs it"
    return pairs, kept


def _output_axes(model: nn.Module, trials: Sequence[Trial]) -> dict[str, int]:
    """Linear layer -> number of axes of its output."""
    axes: dict[str, int] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):

                def note(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                    axes[name] = output.ndim

                stack.callback(module.register_forward_hook(note).remove)
        outputs_of(model, trials[0].inputs, trials[0].wide)
    return axes


def _layer_reason(modules: dict[str, Any], source: Any, calls: Any, uses: Any, axes: dict[str, int]) -> str:
    """Why what stands before a norm cannot take it over; "" when it can."""
    layer = modules.get(str(source.target)) if isinstance(source, fx.Node) and source.op == "call_module" else None
    if not isinstance(layer, (_ConvNd, nn.Linear)) or row_of(APPLIED, type(layer)) is not None:
        return "no convolution or linear layer stands right before it"
    name = str(source.target)
    if len(source.users) > 1:
        return f"`{name}` is read by others too"
    tensors = [layer._parameters.get("weight"), layer._parameters.get("bias")]
    if tensors[0] is None or any(uses[id(tensor)] > 1 for tensor in tensors if tensor is not None):
        return f"the weight of `{name}` is tied or computed"
    if calls[name] > 1 or calls.get(f"{name}.weight", 0):
        return f"`{name}` is used several times"
    return "" if axes.get(name, 2) == 2 else f"the features of `{name}` are not the channels of the norm"


def _fits(model: nn.Module, norm: str, layer: str, trials: Sequence[Trial], kept: dict[str, str]) -> bool:
    """Fold in the working copy; undone, with the reason, where the outputs change."""
    module: Any = model.get_submodule(layer)
    before = module.weight.data, module._parameters.get("bias"), model.get_submodule(norm)
    bias = None if before[1] is None else before[1].data
    _fold(model, norm, layer)
    problem = difference(model, trials[:1])[1]
    if problem:
        module.weight.data, module.bias = before[0], before[1]
        if before[1] is not None:
            before[1].data = bias
        model.set_submodule(norm, before[2])
        kept[norm] = problem
    return not problem


def _fold(model: nn.Module, norm_name: str, layer_name: str) -> None:
    """Put a norm's factors and summands into a layer; what the norm does besides stays in its place."""
    norm: Any = model.get_submodule(norm_name)
    layer: Any = model.get_submodule(layer_name)
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.detach().double())
    shift = -mean * scale + (0.0 if norm.bias is None else norm.bias.detach().double())
    weight, groups = layer.weight.data, getattr(layer, "groups", 1)
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, ...): the groups stand along the inputs
        blocks = weight.unflatten(0, (groups, -1))
        factors = scale.reshape(groups, 1, -1, *(1,) * (weight.ndim - 2))
        scaled = (blocks.double() * factors).flatten(0, 1)
    else:
        scaled = weight.double() * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    layer.weight.data = torch.where(scaled == 0, 0.0, scaled).to(weight.dtype)
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(weight.dtype), layer.weight.requires_grad)
    else:
        layer.bias.data = (layer.bias.data.double() * scale + shift).to(weight.dtype)
    model.set_submodule(norm_name, without_norm(norm))
