"""The path graph: a recorded graph run with every operator replaced by its path rule.

One `PathGraph` is one run, in float64 on an all-ones input. Values that descend from the input are path values and go
through the rule table; everything else is executed as it is. The run records, per masked layer, the leaf tensors of
magnitudes whose gradients are the scores, and which of the layer's input units lie on a path.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from growfx import graph_ops
from growfx.errors import TraceError, UnsupportedOperatorError
from growfx.layers import MaskedLayer
from growfx.passes.path_constants import changed_weight, evaluating_copy, execute, writes_in_place
from growfx.passes.path_rules import APPLIED, function_rule, is_moving, method_rule, module_rule, row_of
from growfx.passes.path_rules_arithmetic import bounded, identity
from growfx.passes.path_values import (
    Learned,
    NoPathRuleError,
    PathValue,
    Token,
    Weight,
    leaves,
    map_leaves,
    paths_in,
    raw,
)

if TYPE_CHECKING:
    from growfx.graph import MaskedGraph

__all__ = ["PathGraph", "describe"]

# Live values are rescaled when one passes e^30; float64 ends at e^709, far enough for what one node can do.
_RESCALE_AT = 2.0**43
_SWITCHES = (torch._C._set_grad_enabled, graph_ops.swap_grad_enabled)
_EMBEDDINGS = (F.embedding, torch.embedding)


def describe(node: fx.Node) -> str:
    """Operator, node and source line, for messages."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    source = node.meta.get("source")
    return f"`{target}` (node `{node.name}`{f', {source}' if source else ''})"


class PathGraph:
    """One run of a network's path graph.

    Args:
        net: the masked graph; its parameters, buffers and modes are read, never changed.
        graph: its recorded evaluation graph for the shapes of the inputs.
        norm: "fold" or "identity".
        power: exponent of every learned factor.
        magnitudes: layer name -> edge magnitudes to use in place of the layer's own (the weight's shape).
        unit_scales: count learned scales and unmasked weights as one.
        rescale: keep live values near one (exact; off only to test that it is).

    Attributes:
        total: sum of the outputs, after `run`.
        exponent: true values are the computed ones times 2**exponent.
        leaves: layer name -> magnitude leaves in use; the gradients of `total` there add up to the score.
        constant_fed: layers that were run on constants only.
        alive_in: layer name -> bool per input unit, filled by the backward pass.
    """

    def __init__(
        self,
        net: MaskedGraph,
        graph: fx.Graph,
        *,
        norm: str = "fold",
        power: float = 1,
        magnitudes: Mapping[str, Tensor] | None = None,
        unit_scales: bool = False,
        rescale: bool = True,
    ) -> None:
        self.net, self.graph = net, graph
        self.norm, self.power, self.unit_scales, self.rescale = norm, power, unit_scales, rescale
        self.magnitudes = magnitudes or {}
        self.layers: Mapping[str, MaskedLayer] = net.layers
        first = next(iter(self.layers.values())).parameter
        self.device, self.model_dtype = first.device, first.dtype
        self.leaves: dict[str, list[Tensor]] = {}
        self.constant_fed: set[str] = set()
        self.alive_in: dict[str, Tensor] = {}
        self.exponent = 0
        self.total: Tensor | None = None
        self._layer_names = {id(layer.parameter): name for name, layer in self.layers.items()}
        self._watched: dict[int, tuple[weakref.ref[Tensor], list[tuple[str, int]]]] = {}
        self._environment: dict[fx.Node, Any] = {}
        self._position = {node: position for position, node in enumerate(graph.nodes)}
        self._writes = any(writes_in_place(node) for node in graph.nodes)

    # What rules ask for

    def layer_of(self, module: nn.Module) -> str | None:
        """The name under which the module's weight is a masked layer (tied weights: once); None when unmasked."""
        return self._layer_names.get(id(module.parameter)) if isinstance(module, MaskedLayer) else None

    def learned(self, parameter: Tensor) -> Tensor:
        """What a learned factor counts for: its magnitude to the given power, or one."""
        if self.unit_scales:
            return torch.ones_like(parameter, dtype=torch.float64, device=self.device, requires_grad=False)
        magnitude = parameter.detach().to(self.device, torch.float64).abs()
        return magnitude if self.power == 1 else magnitude**self.power

    def magnitude(self, value: Any) -> float | Tensor:
        """What a constant counts for as a factor."""
        if isinstance(value, Weight):
            leaf = self._leaf(value.layer, value.applied)
            for step in value.moves:
                leaf = step(leaf)
            return leaf
        if isinstance(value, Learned) and not isinstance(value, Token):
            return self.learned(value.tensor)
        if isinstance(value, Token):
            value = value.tensor
        if isinstance(value, Tensor):
            return value.detach().to(self.device, torch.float64).abs()
        if isinstance(value, (int, float)):
            return abs(float(value))
        raise NoPathRuleError(f"a factor of type `{type(value).__name__}` has no path rule")

    def matrix(self, value: Any) -> Tensor:
        """What a constant tensor counts for."""
        magnitude = self.magnitude(value)
        if not isinstance(magnitude, Tensor):
            raise NoPathRuleError("a number stands where a tensor is needed")
        return magnitude

    def signed(self, module: Any) -> Tensor:
        """The effective weight of a module, zero outside its mask, without gradient."""
        if isinstance(module, MaskedLayer):
            with torch.no_grad():
                full = module.nnz == module.numel
                return module.parameter.detach() if full else torch.where(module.mask, module.parameter, 0)
        name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        return getattr(module, name).detach()

    def weight(self, module: nn.Module) -> Tensor:
        """Edge magnitudes of a module with a weight: a leaf for masked layers, a constant for others."""
        name = self.layer_of(module)
        if name is not None:
            return self._leaf(name)
        applied = row_of(APPLIED, type(module))
        weight = self.signed(module)
        return self.learned(weight if applied is None else applied(module, weight.to(torch.float64)))

    def watch(self, layer: str | None, tensor: Tensor, dim: int) -> None:
        """Note, in the backward pass, which units along `dim` of a layer's input lie on a path."""
        if layer is None:
            return
        known = self._watched.get(id(tensor))
        if known is not None and known[0]() is tensor:
            known[1].append((layer, dim % tensor.ndim))
            return
        waiting = [(layer, dim % tensor.ndim)]
        self._watched[id(tensor)] = weakref.ref(tensor), waiting
        reached = tensor.detach() > 0  # not the tensor itself: a hook that holds its tensor is never freed

        def note(gradient: Tensor) -> None:
            crossed = reached.logical_and(gradient > 0)
            for name, axis in waiting:
                alive = crossed.transpose(0, axis).flatten(1).any(1) if crossed.ndim > 1 else crossed
                self.alive_in[name] = alive | self.alive_in[name] if name in self.alive_in else alive

        if tensor.requires_grad:
            tensor.register_hook(note)

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Apply a module's rule."""
        rule = module_rule(module)
        if rule is None:
            raise NoPathRuleError(f"module class `{type(module).__qualname__}` has no path rule")
        return rule(self, module, *args, **kwargs)

    def function(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply a function's rule."""
        rule = function_rule(target)
        assert rule is not None
        return rule(self, *args, **kwargs)

    def _leaf(self, name: str, applied: Tensor | None = None) -> Tensor:
        """The magnitude leaf of a layer; a weight transformed by the graph has a leaf of its own."""
        known = self.leaves.setdefault(name, [])
        if known and applied is None:
            return known[0]
        layer = self.layers[name]
        with torch.no_grad():
            if name in self.magnitudes:
                leaf = self.magnitudes[name].detach().to(self.device, torch.float64, copy=True)
            else:
                leaf = self._own_magnitudes(layer, applied)
        leaf.requires_grad_()
        known.append(leaf) if applied is not None else known.insert(0, leaf)
        return leaf

    def _own_magnitudes(self, layer: MaskedLayer, applied: Tensor | None) -> Tensor:
        transform = row_of(APPLIED, layer.twin_of)
        if applied is None and transform is None:
            magnitude = self.signed(layer).to(torch.float64, copy=True).abs_()
        else:
            weight = self.signed(layer).to(torch.float64) if applied is None else applied.to(torch.float64)
            weight = weight if transform is None else transform(layer, weight)
            magnitude = torch.where(layer.mask, weight.abs(), 0)
        return magnitude if self.power == 1 else magnitude.pow_(self.power)

    # The run

    def run(self, inputs: Iterable[Tensor]) -> Any:
        """Interpret the graph; sets `total`. Only shape and kind of the inputs count, at batch 1.

        Raises:
            UnsupportedOperatorError: an operator on a path value has no rule.
            TraceError: a value is not finite, a rule cannot be applied, or no path reaches an output.
        """
        waiting = iter(inputs)
        last_use = self._last_uses()
        for node in self.graph.nodes:
            if node.op == "output":
                return self._finish(map_leaves_of(node.args[0], self._environment))
            result = self._placeholder(node, waiting) if node.op == "placeholder" else self._evaluate(node)
            self._environment[node] = result
            for dead in last_use.get(node, ()):
                self._environment.pop(dead, None)
            self._settle(node, result)
        raise TraceError("the recorded graph has no output node; wrap the model again")

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            last[node] = node
            for source in node.all_input_nodes:
                last[source] = node
        ending: dict[fx.Node, list[fx.Node]] = {}
        for node, end in last.items():
            ending.setdefault(end, []).append(node)
        return ending

    def _placeholder(self, node: fx.Node, waiting: Any) -> Any:
        value = next(waiting, node.args[0] if node.args else None)
        if not isinstance(value, Tensor):
            return value
        one = value[:1] if value.ndim else value
        if value.is_floating_point():
            return self._source(one.shape)
        return Token(one.to(self.device)) if value.dtype != torch.bool else one.to(self.device)

    def _source(self, shape: torch.Size) -> PathValue:
        """Units where paths begin, at the scale of the other live values."""
        ones = torch.full(shape, 2.0**-self.exponent, dtype=torch.float64, device=self.device)
        return PathValue(ones.requires_grad_())

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        args = map_leaves_of(node.args, self._environment)
        kwargs = map_leaves_of(node.kwargs, self._environment)
        try:
            if not paths_in(args, kwargs):
                with torch.no_grad():
                    return self._constant(node, args, kwargs)
            return self._apply(node, args, kwargs)
        except NoPathRuleError as reason:
            raise UnsupportedOperatorError(
                f"no path rule for {describe(node)}: {reason}. Path products need a rule for every operator between "
                "input and output; rewrite the operator with supported ones (`growfx.passes.path_rules` lists them)"
            ) from None
        except (TraceError, torch.OutOfMemoryError):
            raise
        except Exception as problem:
            raise TraceError(f"the path rule of {describe(node)} failed: {problem}") from problem

    def _apply(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            return self.call(self.net.get_submodule(str(node.target)), *args, **kwargs)
        if node.op == "call_method" and not isinstance(args[0], (Tensor, PathValue, Learned, Weight)):
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)  # a method of a container
        self._check_write(node)
        rule = function_rule(node.target) if node.op == "call_function" else method_rule(str(node.target))
        if not args and "input" in kwargs:
            args, kwargs = (
                (kwargs["input"],),
                {name: item for name, item in kwargs.items() if name != "input"},
            )
        if rule is None:
            raise NoPathRuleError("the operator is not in the table")
        return rule(self, *args, **kwargs)

    def _check_write(self, node: fx.Node) -> None:
        """Refuse to write into a part of a path value whose whole is read again: the whole would miss the write."""
        if not writes_in_place(node) or method_rule(str(node.target)) in (identity, bounded):
            return
        source = node.args[0]
        while isinstance(source, fx.Node) and is_moving(source.op, source.target):
            source = source.args[0]
            if isinstance(source, fx.Node) and any(
                self._position[user] > self._position[node] for user in source.users
            ):
                raise NoPathRuleError("it writes into a part of a tensor that is used as a whole later")

    def _attribute(self, target: str) -> Any:
        way, _, last = target.rpartition(".")
        owner: Any = self.net.get_submodule(way) if way else self.net.shell
        if isinstance(owner, MaskedLayer) and last in ("effective_weight", owner.weight_name):
            name = self.layer_of(owner)
            if name is not None:
                return Weight(name, self.signed(owner))
        value = getattr(owner, last)
        if self._writes and isinstance(value, Tensor):
            copied = value.detach().clone()  # the graph writes into tensors; the network's own stay as they are
            return Learned(copied) if isinstance(value, nn.Parameter) else copied
        return Learned(value.detach()) if isinstance(value, nn.Parameter) else value

    def _constant(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Execute a node without path values, leaving every parameter, buffer and mode as it is."""
        if node.target in _SWITCHES:
            return True
        inputs = list(leaves((args, kwargs)))
        token = any(isinstance(item, Token) for item in inputs)
        embeds = node.target in _EMBEDDINGS
        if node.op == "call_module":
            module = self.net.get_submodule(str(node.target))
            self._note_constant_fed(module)
            embeds = isinstance(module, nn.Embedding)
            result = evaluating_copy(module)(*raw(args), **raw(kwargs))
            learned = next(module.parameters(), None) is not None
        else:
            weights = [item for item in inputs if isinstance(item, Weight)]
            if len(weights) == 1 and args and args[0] is weights[0]:
                return changed_weight(node, weights[0], args, kwargs, self.layers[weights[0].layer].parameter.shape)
            result = execute(node, raw(args), raw(kwargs))
            learned = any(isinstance(item, (Learned, Weight)) for item in inputs)
        if token and embeds:
            return self._source(result.shape)
        kind = Token if token else Learned
        return map_leaves(lambda item: kind(item) if isinstance(item, Tensor) and (learned or token) else item, result)

    def _note_constant_fed(self, module: nn.Module) -> None:
        for part in module.modules():
            name = self.layer_of(part)
            if name is not None:
                self.constant_fed.add(name)

    def _settle(self, node: fx.Node, result: Any) -> None:
        """Check the node's values and bring all live values back towards one where needed."""
        peak = 0.0
        for value in paths_in(result):
            if value.peak is None:
                value.peak = float(value.tensor.detach().amax()) if value.tensor.numel() else 0.0
            if not math.isfinite(value.peak):
                raise TraceError(
                    f"the path value of {describe(node)} is not finite ({value.peak}); look for infinite or nan "
                    "weights, norm scales or running variances before it"
                )
            peak = max(peak, value.peak)
        if not self.rescale or peak == 0 or 1 / _RESCALE_AT <= peak <= _RESCALE_AT:
            return
        live = {id(value): value for value in paths_in(list(self._environment.values())) if not value.divisor}
        largest = max((value.peak or 0.0 for value in live.values()), default=0.0)
        # Up only when everything is small: otherwise two branches of different size would chase each other.
        if largest > _RESCALE_AT or 0 < largest < 1 / _RESCALE_AT:
            self._scale(live.values(), -math.frexp(largest)[1])

    def _scale(self, live: Iterable[PathValue], exponent: int) -> None:
        """Multiply all live path values by 2**exponent: they are a cut of the graph, so all scores change alike."""
        scaled: dict[int, tuple[Tensor, Tensor]] = {}
        for value in live:
            old = value.tensor
            if id(old) not in scaled:
                scaled[id(old)] = old, old * 2.0**exponent
            value.tensor = scaled[id(old)][1]
            value.peak = None if value.peak is None else value.peak * 2.0**exponent
        self.exponent -= exponent

    def _finish(self, output: Any) -> Any:
        values = [value for value in paths_in(output) if not value.divisor]
        if not values:
            raise TraceError("no path leads from the network's input to its output; path products need one")
        self.total = torch.stack([value.tensor.sum() for value in values]).sum()
        self._environment.clear()
        return output


def map_leaves_of(nest: Any, environment: dict[fx.Node, Any]) -> Any:
    """Node arguments with values in place of nodes."""
    return map_arg(nest, lambda node: environment[node])
