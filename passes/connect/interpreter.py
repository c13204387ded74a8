"""Unit connectivity: which output units of which layers feed which input units, and which stand and fall together.

The recorded graph is run on the numbers of units instead of values: operators that move elements are executed as they
are, so that no index has to be computed here, and operators that combine elements say which units meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from growfx.analysis.connectivity import Connectivity
from growfx.errors import TraceError
from growfx.masked.graph import MaskedGraph
from growfx.masked.layers import MaskedLayer
from growfx.masked.present.storage import on_whole_weights
from growfx.passes.connect.ends import begin, begin_behind, lose, pin_layers, selects, source
from growfx.passes.connect.operations import has_meta, of_shapes, operation, paired
from growfx.passes.connect.results import found
from growfx.passes.connect.rules import elementwise as connect_rules
from growfx.passes.connect.rules import layers as connect_layers
from growfx.passes.connect.rules import norms as connect_norms
from growfx.passes.connect.rules import products as connect_products
from growfx.passes.connect.run import UnitRun
from growfx.passes.connect.signals import narrowed, numbers
from growfx.passes.connect.values import Ids, Named, Token, WeightPart, real, slots_in
from growfx.passes.operators.classes import APPLIED, row_of
from growfx.passes.operators.constants import evaluating_copy, execute
from growfx.passes.operators.names import CASTS, describe, is_moving, short_name, writes_in_place
from growfx.passes.operators.nests import leaves, map_leaves
from growfx.passes.path_products.integer_data import embeds, where_data_begins
from growfx.passes.path_products.rules.table import family_of, module_rule, node_rule
from growfx.passes.record.recording import meta_copy

__all__ = ["MODULES", "OPERATORS", "UnitGraph", "connect"]

# How operators pass signals on, by the family of their path rule.
OPERATORS = {
    **connect_norms.OPERATORS,
    **connect_rules.OPERATORS,
    **connect_products.OPERATORS,
    **connect_layers.OPERATORS,
}
MODULES = {**connect_norms.MODULES, **connect_rules.MODULES, **connect_layers.MODULES}

# The rules that know what a layer's weight does; for all others it would be a constant.
_OF_WEIGHTS = (*connect_products.OPERATORS.values(), connect_layers.OPERATORS["convolution"])


@on_whole_weights
def connect(net: MaskedGraph, example_inputs: Any = None) -> Connectivity:
    """Find which units feed which, and which are coupled.

    Args:
        net: a masked graph from `growfx.wrap`, on any device, the meta device included; nothing of it is changed.
        example_inputs: only shapes and kinds count, at batch 1; default: as recorded.

    What it does not understand it pins, with the reason.

    Raises:
        TraceError: the network was not recorded faithfully, or an operator fails on shapes alone.
    """
    inputs = net.inputs_like(example_inputs)
    run = UnitGraph(net, net.graph_for(inputs, look_inside=True))
    with torch.no_grad():
        run.run(inputs.values)
    slots = {name: named.ids for name, _, named in run.parameters.values() if named.ids is not None}
    return found(run.signals, run.layers, run.inputs, slots, run.frames.values())


class UnitGraph(UnitRun):
    """The interpreter: a recorded graph run on unit numbers."""

    def __init__(self, net: MaskedGraph, graph: fx.Graph) -> None:
        super().__init__(net)
        self.graph = graph
        self._environment: dict[fx.Node, Any] = {}
        self._begins: frozenset[fx.Node] = frozenset()
        self._writes = any(writes_in_place(node) for node in graph.nodes)

    def run(self, inputs: Sequence[Any]) -> None:
        """Interpret the graph."""
        self._begins = where_data_begins(self.net, self.graph, inputs)
        waiting = iter(inputs)
        self.flat = all(item.ndim < 2 for item in leaves(tuple(inputs)) if isinstance(item, Tensor))
        last: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            for used in (node, *node.all_input_nodes):
                last[used] = node
        ending: dict[fx.Node, list[fx.Node]] = {}
        for node, end in last.items():
            ending.setdefault(end, []).append(node)
        for node in self.graph.nodes:
            self._step(node, waiting)
            for dead in ending.get(node, ()):
                self._environment.pop(dead, None)
        for name, reason in self._held.items():  # at the end: a later use may feed the layer something else
            layer = self.layers[name]
            for signals in (layer.units, *layer.signals):
                self.signals.pin(signals, reason)

    def _step(self, node: fx.Node, waiting: Iterator[Any]) -> None:
        if node.op == "output":
            for value in leaves(self._mapped(node.args[0])):
                if isinstance(value, Ids):
                    self.signals.pin(numbers(narrowed(value.tensor)), "it is an output of the network")
            return
        self.place = describe(node)
        if node.op == "placeholder":
            result = begin(self, node, next(waiting, node.args[0] if node.args else None))
        elif node.op == "get_attr":
            result = self._attribute(str(node.target))
        else:
            try:
                result = self._evaluate(node, self._mapped(node.args), self._mapped(node.kwargs))
            except (TraceError, torch.OutOfMemoryError):
                raise
            except Exception as problem:
                raise TraceError(f"unit connectivity failed at {self.place}: {problem}") from problem
        self._environment[node] = result
        if isinstance(result, Ids):
            self.frame(result.tensor)

    def _mapped(self, nest: Any) -> Any:
        return map_arg(nest, lambda node: self._environment[node])

    def _attribute(self, target: str) -> Any:
        way, _, last = target.rpartition(".")
        owner: Any = self.net.get_submodule(way) if way else self.net.shell
        if isinstance(owner, MaskedLayer) and last in ("effective_weight", owner.weight_name):
            name = self.layer_name(owner, way)
            self.register(name, owner)
            shape = owner.parameter.shape
            return WeightPart(name, torch.arange(shape.numel(), device="cpu").reshape(shape))
        value = getattr(owner, last)
        if not isinstance(value, Tensor):
            return value
        weight = self._weights.get(id(value))
        if weight is not None:
            self.register(weight, self.net.get_submodule(weight))
            return WeightPart(weight, torch.arange(value.numel(), device="cpu").reshape(value.shape))
        named = self.parameter(target, value)
        return Named(named.tensor.clone(), named.ids) if self._writes else named

    def _evaluate(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        items = list(leaves((args, kwargs)))
        module = node.op == "call_module"
        self.name = type(self.net.get_submodule(str(node.target))).__name__ if module else short_name(node)
        if selects(self, args, kwargs):
            return lose(self, node, args, kwargs)
        if node.op == "call_module":
            return self._module(node, args, kwargs)
        op = operation(node)
        if any(isinstance(item, Ids) for item in items):
            if node.op == "call_method" and not isinstance(args[0], (Tensor, Ids, Named, WeightPart)):
                return op(*args, **kwargs)
            return self._ruled(node, op, args, kwargs)
        if args and isinstance(args[0], WeightPart):
            return self._moved_weight(node, op, args, kwargs)
        return self._constant(node, op, args, kwargs)

    def _ruled(self, node: fx.Node, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        family = family_of(node_rule(node))
        if family == "container":
            return op(*args, **kwargs)
        rule = OPERATORS.get(family)
        weights = any(isinstance(item, WeightPart) for item in leaves((args, kwargs)))
        beside = weights and rule not in _OF_WEIGHTS and self.name not in CASTS
        if rule is None or beside or (rule in connect_rules.INDEXED and has_meta((args[1:], kwargs))):
            return self.unknown(op, args, kwargs)
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {name: item for name, item in kwargs.items() if name != "input"}
        return rule(self, op, *args, **kwargs)

    def _module(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target = str(node.target)
        module = self.net.get_submodule(target)
        items = list(leaves((args, kwargs)))
        if any(isinstance(item, WeightPart) for item in items):
            pin_layers(self, module, target, "it works on a weight")
            following = any(isinstance(item, Ids) for item in items)
            return (self.unknown if following else self._lost_weight)(meta_copy(module).eval(), args, kwargs)
        if not any(isinstance(item, Ids) for item in items):
            pin_layers(self, module, target, "it is fed by constants only")
            result = evaluating_copy(module)(*real(args), **real(kwargs))
            if node in self._begins:
                return begin_behind(self, node, result)
            tokens = any(isinstance(item, Token) for item in items)
            return source(self, target, result.shape, -1) if tokens and embeds(node, module) else result
        return self.call(module, target, *args, **kwargs)

    def call(self, module: nn.Module, target: str, *args: Any, **kwargs: Any) -> Any:
        """Apply a module's rule."""
        before = self.module, self.target, self.layer, self.applied
        self.module, self.target, self.layer = module, target, self.layer_name(module, target)
        rule = MODULES.get(family_of(module_rule(module)))
        self.applied = row_of(APPLIED, getattr(type(module), "twin_of", type(module))) is not None

        def op(*inner: Any, **options: Any) -> Any:
            return meta_copy(module).eval()(*inner, **options)

        try:
            return self._unknown_module(op, args, kwargs) if rule is None else rule(self, op, *args, **kwargs)
        finally:
            self.module, self.target, self.layer, self.applied = before

    def _unknown_module(self, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        pin_layers(self, self.module, self.target, f"not followed through {self.place}")
        return self.unknown(op, args, kwargs)

    def _moved_weight(self, node: fx.Node, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        part: WeightPart = args[0]
        if self.name in CASTS:
            return part
        if not any(isinstance(item, WeightPart) for item in args[1:]):
            rest, options = real(args[1:]), real(kwargs)
            if is_moving(node.op, node.target):
                result = op(part.places, *rest, **options)
                return map_leaves(
                    lambda item: WeightPart(part.layer, item, part.counted) if isinstance(item, Tensor) else item,
                    result,
                )
            shape = self.shapes(op, args, kwargs)
            if shape == part.places.shape:
                if any(isinstance(item, Tensor) and item.numel() > 1 for item in leaves((rest, options))):
                    self.hold(part, f"its weight meets another tensor in {self.place}")
                    for slots in slots_in((args, kwargs)):
                        self.signals.pin(numbers(narrowed(slots)), f"it meets a weight in {self.place}")
                return WeightPart(part.layer, part.places, True)
            if not isinstance(shape, torch.Size):
                return shape
        return self._lost_weight(op, args, kwargs)

    def _lost_weight(self, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What is computed from a layer's weight and can no longer be told apart by its units."""
        self.hold((args, kwargs), f"its weight is transformed in {self.place}")
        for slots in slots_in((args, kwargs)):
            self.signals.pin(numbers(narrowed(slots)), f"it meets a transformed weight in {self.place}")
        return of_shapes(self.shapes(op, args, kwargs), torch.zeros)

    def _constant(self, node: fx.Node, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Execute a node on constants; slots of parameters move along where their rule allows."""
        if self.name in ("_set_grad_enabled", "swap_grad_enabled"):
            return True
        if any(isinstance(item, WeightPart) for item in leaves((args, kwargs))):
            if self.name not in CASTS or "input" in kwargs:
                return self._lost_weight(op, args, kwargs)
            like = torch.empty(0, dtype=self.model_dtype, device=real(args[0]).device)  # a weight lends its type alone
            args, kwargs = map_leaves(lambda item: like if isinstance(item, WeightPart) else item, (args, kwargs))
        result = execute(node, real(args), real(kwargs))
        if node in self._begins:
            return begin_behind(self, node, result)
        named = [item for item in leaves((args, kwargs)) if isinstance(item, Named)]
        if any(isinstance(item, Token) for item in named):
            if embeds(node, None):
                return source(self, node.name, result.shape, -1)
            return map_leaves(lambda item: Token(item) if isinstance(item, Tensor) else item, result)
        if not named or not any(isinstance(item, Tensor) for item in leaves(result)):
            return result
        slots: Any = None
        if all(item.ids is not None for item in named):
            slots = self._slots(node, op, args, kwargs)
        if slots is None:
            for item in named:  # of a parameter that is used elsewhere too, nothing can leave
                if item.ids is not None:
                    self.signals.pin(numbers(narrowed(item.ids)), f"not followed through {self.place}")
        return paired(result, slots)

    def _slots(self, node: fx.Node, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        pins, counts = len(self.signals.pins), len(self.signals.counts)
        as_ids = lambda item: Ids(item.ids) if isinstance(item, Named) and item.ids is not None else item  # noqa: E731
        try:
            slots = self._ruled(node, op, map_leaves(as_ids, args), map_leaves(as_ids, kwargs))
        except Exception:  # the rules are made for activations: what they refuse here is simply not followed
            slots = None
        if len(self.signals.pins) > pins or len(self.signals.counts) > counts:
            slots = None
        del self.signals.pins[pins:], self.signals.counts[counts:]
        return slots
