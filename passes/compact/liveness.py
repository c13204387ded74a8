"""Which units depend on the input, which ones the output needs, and which columns always see one constant.

Judged on the values that the network has now, in evaluation mode: a weight or a norm's scale that is exactly zero
passes nothing, whether a mask holds it there or not. Nothing is read off from activations alone, for a ReLU may
be silent on some inputs only: a column counts as constant when nothing that depends on the input is led to it, or
when it stays the same while *every* unit that does depend on the input is replaced by noise of all scales and signs
(behind a scale of zero, or multiplied by a unit that is always zero).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from growfx.analysis.connectivity import Connectivity
from growfx.analysis.signal_graph import Origin, Reach
from growfx.compaction.apply import columns_axis
from growfx.passes.trials.comparison import with_rows
from growfx.passes.trials.precision import largest_result, widened
from growfx.recorded.inputs import Inputs

__all__ = ["Liveness", "edges", "find_liveness"]

# A constant is the same everywhere up to the rounding of different kernels at the borders of a vector.
_SAME = {torch.float64: 1e-12, torch.float32: 1e-5}
# A shift before an activation must not hide noise: some of it is larger than any shift.
_SCALES = (1e6, 1.0, 1e3)
_ROWS = 8
# Fewer rows where they are large: more elements than these are not put in at once.
_ELEMENTS = 1 << 21
# The same of the largest of all activations; for inputs with fewer elements than `_SMALL` it is not looked for.
_MADE, _SMALL = 1 << 23, 1 << 14


@dataclass(frozen=True)
class Liveness:
    """What is known of the units of a network, numbered as in its `Connectivity`.

    Attributes:
        fed: unit -> whether its value depends on the input; index 0 is False.
        needed: unit -> whether the output depends on its value.
        varies: layer -> bool per input column: what stands there depends on the input.
        constant: layer -> per input column the constant that stands there everywhere; nan where it varies, or differs
            between positions (where a padding of zeros met a constant).
        edges: layer -> bool (outputs, columns): some weight between them is not zero.
    """

    fed: Tensor
    needed: Tensor
    varies: dict[str, Tensor]
    constant: dict[str, Tensor]
    edges: dict[str, Tensor]


def edges(module: nn.Module) -> Tensor | None:
    """Between which outputs and columns of a layer there is a weight that is not zero; None for other layers."""
    weight = module._parameters.get("weight")
    if not isinstance(module, (_ConvNd, nn.Linear)) or weight is None:
        return None
    active = weight.detach() != 0
    active = active.flatten(2).any(2) if active.ndim > 2 else active
    groups = getattr(module, "groups", 1)
    blocks = active.unflatten(0, (groups, -1))
    if columns_axis(module) == 0:
        blocks = blocks.mT
    return torch.block_diag(*blocks).bool().cpu() if groups > 1 else blocks[0].cpu()


def find_liveness(
    model: nn.Module, graph: fx.Graph, found: Connectivity, trials: Sequence[Inputs], wide: bool = False
) -> Liveness:
    """Follow what depends on the input forward, and what the output needs backward.

    Args:
        model: the plain model in evaluation mode, zeros baked into its weights.
        graph: its recorded graph, for norms right behind a layer.
        found: its connectivity.
        trials: inputs to observe constants on, of several sizes where the model takes them.
        wide: whether the model is run in float64 throughout.
    """
    known = Liveness(
        fed=torch.zeros(len(found.group), dtype=torch.bool, device="cpu"),
        needed=torch.zeros(len(found.group), dtype=torch.bool, device="cpu"),
        varies={},
        constant={},
        edges={name: _edges(model, found, name) for name in found.layers},
    )
    kept = torch.zeros(len(found.group), dtype=torch.bool, device="cpu")
    kept[[*found.pinned, *found.counted]] = True
    always = kept[found.group]
    always[0] = False
    everywhere = Reach(found.signals, torch.arange(1, len(found.group), device="cpu"))
    for name, layer in found.layers.items():
        known.varies[name] = ~everywhere.at(name, len(layer.sources)) & (layer.sources != 0)
    _follow_inputs(known, found, always)
    watch = _Watch(model, found, known, wide)
    watch.run(trials)
    if watch.settle():  # what turned out to be constant may leave more without a path
        known.fed.fill_(False)
        _follow_inputs(known, found, always)
        watch = _Watch(model, found, known, wide)
        watch.run(trials)
        watch.settle()
    _follow_outputs(known, found, always, _silenced(model, graph, found))
    return known


def _edges(model: nn.Module, found: Connectivity, name: str) -> Tensor:
    layer = found.layers[name]
    try:
        active = edges(model.get_submodule(name))
    except AttributeError:  # a part of an attention that is a parameter, no module
        active = None
    shape = (len(layer.outputs), len(layer.sources))
    return torch.ones(shape, dtype=torch.bool, device="cpu") if active is None or active.shape != shape else active


def _follow_inputs(known: Liveness, found: Connectivity, always: Tensor) -> None:
    """Mark the units that depend on the input, to a fixed point (layers may be used several times)."""
    known.fed.logical_or_(always)
    for units in found.inputs.values():
        known.fed[units] = True
    lost = {name: known.varies[name].clone() for name in found.layers}
    allowed = {name: ~(known.constant[name] == known.constant[name]) for name in known.constant}
    reach = Reach(found.signals, known.fed)
    changed = True
    while changed:
        changed = False
        for name, layer in found.layers.items():
            varies = lost[name] | reach.at(name, len(layer.sources))
            varies &= allowed.get(name, torch.ones_like(varies))
            known.varies[name] = varies
            fed = known.edges[name][:, varies].any(1) & ~known.fed[layer.outputs]
            if fed.any():
                known.fed[layer.outputs[fed]] = True
                reach.add(layer.outputs[fed])
                changed = True


def _follow_outputs(known: Liveness, found: Connectivity, always: Tensor, silenced: Tensor) -> None:
    """Mark the units that the output needs, to a fixed point."""
    known.needed.logical_or_(always & ~silenced)
    for units in found.inputs.values():
        known.needed[units] = True
    by_any, by_constants = Origin(found.signals), Origin(found.signals)
    read = by_any.add_ends()  # a mix of units has none that must stay, and all of them are needed
    known.needed[read[~silenced[read]]] = True
    changed = True
    while changed:
        changed = False
        for name in reversed(list(found.layers)):
            rows = known.needed[found.layers[name].outputs]
            used = known.edges[name][rows].any(0)
            # What depends on the input and still leaves a column constant has no effect there.
            varies = known.varies[name] | known.constant[name].isnan()
            constants = by_constants.add(name, used & ~varies)
            new = torch.cat([by_any.add(name, used & varies), constants[~known.fed[constants]]])
            new = new[~known.needed[new] & ~silenced[new]]
            if len(new):
                known.needed[new] = True
                changed = True


def _silenced(model: nn.Module, graph: fx.Graph, found: Connectivity) -> Tensor:
    """Units that go into nothing but a batch norm whose scale is zero there."""
    silent = torch.zeros(len(found.group), dtype=torch.bool, device="cpu")
    for node in graph.nodes:
        if node.op != "call_module" or str(node.target) not in found.layers or len(node.users) != 1:
            continue
        user = next(iter(node.users))
        norm: Any = model.get_submodule(str(user.target)) if user.op == "call_module" else None
        once = sum(other.target == node.target for other in graph.nodes) == 1
        if once and isinstance(norm, _NormBase) and norm.track_running_stats and norm._parameters["weight"] is not None:
            outputs = found.layers[str(node.target)].outputs
            if len(outputs) == len(norm.weight):
                silent[outputs[(norm.weight.detach() == 0).cpu()]] = True
    return silent


@dataclass(eq=False)
class _Watch:
    """Runs of the model in which every unit that depends on the input is noise, and what its layers see then."""

    model: nn.Module
    found: Connectivity
    known: Liveness
    wide: bool = False
    hidden: set[str] = field(default_factory=set)  # layers that take or return something else than real numbers
    low: dict[str, Tensor] = field(default_factory=dict)
    high: dict[str, Tensor] = field(default_factory=dict)
    floating: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.modules = {
            name: module
            for name, module in self.model.named_modules()
            if name in self.found.layers and isinstance(module, (_ConvNd, nn.Linear))
        }

    def run(self, trials: Sequence[Inputs]) -> None:
        """Observe the model on noise of the shapes of `trials`."""
        tensors = [leaf for trial in trials for leaf in pytree.tree_leaves((trial.args, dict(trial.kwargs)))]
        self.floating = all(leaf.is_floating_point() for leaf in tensors if isinstance(leaf, Tensor))
        sizes = {trial.signature: trial for trial in trials}
        rows = {signature: self._rows(trial) for signature, trial in sizes.items()}
        with ExitStack() as stack, torch.no_grad(), widened(self.wide):
            for name, module in self.modules.items():
                stack.callback(module.register_forward_pre_hook(self._seeing(name, module)).remove)
                stack.callback(module.register_forward_hook(self._replacing(name, module)).remove)
            ascending = sorted(sizes.values(), key=_elements)  # the smallest is the quickest, and used most
            for i in range(max(len(sizes), len(_SCALES))):
                self.scale, trial = _SCALES[i % len(_SCALES)], ascending[i % len(sizes)]
                many = with_rows(trial, rows[trial.signature])
                args, kwargs = pytree.tree_map(self._noise_input, (many.args, dict(many.kwargs)))
                self.model(*args, **kwargs)

    def _rows(self, trial: Inputs) -> int:
        """As many rows as make neither the inputs nor what is computed of them too large, and two at least."""
        elements, batch = max(_elements(trial), 1), trial.batch or 1
        rows = _ELEMENTS * batch // elements
        if elements >= _SMALL:
            rows = min(rows, _MADE * batch // largest_result(self.model, trial, self.wide))
        return min(_ROWS, max(2, rows))

    def _noise_input(self, value: Any) -> Any:
        """Noise in the place of an input; about one number for each row (a time) there is no more than a little."""
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim < 2:
            return value + torch.randn(value.shape, generator=self.generator, device="cpu").to(value)
        return self._noise(value, 1)

    def _noise(self, value: Any, axis: int) -> Any:
        """Noise of one sign per row and channel; the second half of the rows has the signs of the first reversed."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim == 0:
            return value
        if axis % value.ndim == 0:  # there are no rows
            return self._noise(value.unsqueeze(0), 1).squeeze(0)
        size = torch.randn(value.shape, generator=self.generator, device="cpu").abs_() * self.scale
        half = (value.shape[0] + 1) // 2
        signs = torch.randint(2, (half, value.shape[axis]), generator=self.generator, device="cpu") * 2 - 1
        signs = torch.cat([signs, -signs])[: value.shape[0]]
        return (size.movedim((0, axis), (-2, -1)) * signs).movedim((-2, -1), (0, axis)).to(value)

    def _seeing(self, name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any) -> None:
            if not args or not _observable(args[0]):
                self.hidden.add(name)
                return
            seen = args[0].detach().movedim(_channels(module, args[0]), 0)
            seen = seen.reshape(seen.shape[0], -1)
            low, high = seen.amin(1).cpu(), seen.amax(1).cpu()
            if name in self.low:
                low, high = torch.minimum(low, self.low[name]), torch.maximum(high, self.high[name])
            self.low[name], self.high[name] = low, high

        return hook

    def _replacing(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        fed = self.known.fed[self.found.layers[name].outputs]

        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            if not _observable(output) or output.shape[_channels(module, output)] != len(fed):
                self.hidden.add(name)
                return output
            axis = _channels(module, output)
            shape = [-1 if i == axis % output.ndim else 1 for i in range(output.ndim)]
            return torch.where(fed.to(output.device).reshape(shape), self._noise(output, axis), output)

        return hook

    def constants(self) -> dict[str, Tensor]:
        """Layer -> the constant at each column, nan where there is none."""
        result = {}
        for name, layer in self.found.layers.items():
            result[name] = torch.full((len(layer.sources),), torch.nan, dtype=torch.float64, device="cpu")
            low, high = self.low.get(name), self.high.get(name)
            if low is None or high is None or len(low) != len(layer.sources) or layer.mixes_positions:
                continue
            if name in self.hidden:
                continue
            spread = high - low  # infinite where an exponential of noise was, which is not constant
            near = spread.isfinite() & (spread <= _SAME.get(low.dtype, 1e-5) * torch.maximum(low.abs(), high.abs()))
            result[name][near] = low[near].double()
        return result

    def settle(self) -> bool:
        """Take columns that stayed the same as constant; whether any of them was thought to vary."""
        surprised = False
        replaced = torch.zeros(len(self.found.group), dtype=torch.bool, device="cpu")
        for other in (self.modules.keys() & self.low.keys()) - self.hidden:
            replaced[self.found.layers[other].outputs] = True
        for inputs in self.found.inputs.values():
            replaced[inputs] = self.floating
        replaced[0] = True
        others = Reach(self.found.signals, ~replaced)
        for name, constant in self.constants().items():
            varies, layer = self.known.varies[name], self.found.layers[name]
            # Only where all that reaches the column was replaced.
            certain = (layer.sources > 0) & ~others.at(name, len(layer.sources))
            same = varies & certain & ~constant.isnan()
            varies[same] = False
            constant[varies] = torch.nan
            self.known.constant[name] = constant
            surprised |= bool(same.any())
        return surprised


def _observable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _elements(inputs: Inputs) -> int:
    return sum(
        leaf.numel() for leaf in pytree.tree_leaves((inputs.args, dict(inputs.kwargs))) if isinstance(leaf, Tensor)
    )


def _channels(module: Any, value: Tensor) -> int:
    """The axis of channels or features."""
    return value.ndim - 1 if isinstance(module, nn.Linear) else value.ndim - 1 - len(module.kernel_size)
