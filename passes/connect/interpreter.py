"""Unit connectivity: which output units of which layers feed which input units, and which stand and fall together.

The recorded graph is run on the numbers of units instead of values: operators that move elements are executed as they
are, so that no index has to be computed here, and operators that combine elements say which units meet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.conv import _ConvTransposeNd

from growfx.analysis.connectivity import Connectivity
from growfx.errors import TraceError
from growfx.masked.layers import MaskedLayer
from growfx.passes.connect import ends as connect_ends
from growfx.passes.connect.operations import (
    has_meta,
    maker,
    meta_module,
    of_shapes,
    on_meta,
    operation,
    paired,
)
from growfx.passes.connect.results import Fed, found
from growfx.passes.connect.rules import elementwise as connect_rules
from growfx.passes.connect.rules import layers as connect_layers
from growfx.passes.connect.rules import norms as connect_norms
from growfx.passes.connect.rules import products as connect_products
from growfx.passes.connect.signals import MIX, SLOT, UNIT, Ints, Signals, filled, narrowed, numbers
from growfx.passes.connect.values import Ids, Lost, Named, Token, WeightPart, real, slots_in, whole
from growfx.passes.operators.classes import APPLIED, row_of
from growfx.passes.operators.constants import evaluating_copy, execute, writes_in_place
from growfx.passes.operators.names import CASTS, describe, is_moving, short_name
from growfx.passes.operators.nests import leaves, map_leaves
from growfx.passes.path_products.rules.table import function_rule, method_rule, module_rule

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["MODULES", "OPERATORS", "UnitGraph", "connect"]

_ENDS: Any = connect_ends  # type checkers know this file by two names, through the link, and its class too

# How operators pass signals on, by the name of their path rule.
OPERATORS = {
    **connect_norms.OPERATORS,
    **connect_rules.OPERATORS,
    **connect_products.OPERATORS,
    **connect_layers.OPERATORS,
}
MODULES = {**connect_norms.MODULES, **connect_rules.MODULES, **connect_layers.MODULES}

# The rules that know what a layer's weight does; for all others it would be a constant.
_OF_WEIGHTS = (*connect_products.OPERATORS.values(), connect_layers.OPERATORS["convolving"])

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)


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


class UnitGraph:
    """One run of a recorded graph on unit numbers.

    Attributes:
        signals: what is known of units and of what is made of them.
        layers: name -> units, and what feeds its columns.
        name: the operator being passed: function or method name, or the module's class.
        place: the node and its source line, for reasons.
        module: the module being called, under `target`, known as `layer`; `applied` when it transforms its weight,
            `scales_last` when it is a norm over trailing axes.
        flat: whether the inputs are vectors, which have features and no batch.
    """

    def __init__(self, net: MaskedGraph, graph: fx.Graph) -> None:
        self.net, self.graph = net, graph
        self.signals = Signals()
        self.layers: dict[str, Fed] = {}
        self.inputs: dict[str, Ints] = {}
        self.frames: dict[bytes, Tensor] = {}
        self.name = self.place = self.target = self.layer = ""
        self.module: Any = None
        self.applied = self.scales_last = self.flat = False
        first = next(net.parameters(), torch.empty(0))
        self.model_dtype = first.dtype
        self._masked = {id(layer.parameter): name for name, layer in net.layers.items()}
        self._weights = {id(m.weight): n for n, m in net.shell.named_modules() if isinstance(m, _LAYERS[:2])}
        self.parameters: dict[int, tuple[str, Tensor, Named]] = {}
        self._held: dict[str, str] = {}
        self._environment: dict[fx.Node, Any] = {}
        self._writes = any(writes_in_place(node) for node in graph.nodes)

    # What rules ask for

    def outputs(self, layer: str, units: int, columns: int, groups: int = 1) -> Ints:
        """The output units of a layer, new at its first use."""
        if layer not in self.layers:
            self.layers[layer] = Fed(self.signals.fresh(units, UNIT), columns, groups)
        return self.layers[layer].units

    def feeds(self, layer: str, columns: Ints, signals: Ints) -> None:
        """Note what stands at a layer's columns."""
        known = self.layers[layer]
        known.at.append(columns)
        known.signals.append(signals)
        if len(known.at) > 1:  # used again: a column has to suit all uses
            self.couple_columns(np.concatenate(known.at), np.concatenate(known.signals))
        mixes = self.signals.kind[signals] == MIX
        if len(np.unique(signals[mixes])) > 1:
            inside = [
                self.signals.members[mix] for mix in np.unique(signals[mixes]).tolist() if mix in self.signals.members
            ]
            for members in inside:
                self.signals.pin(members, f"`{layer}` has a column for each of several mixes of it")
        if mixes.any():
            beside = np.isin(columns, columns[mixes])
            self.signals.pin(signals[beside & ~mixes], f"`{layer}` sees it where it sees a mix of units elsewhere")

    def couple_columns(self, columns: Ints, signals: Ints) -> None:
        """Couple what stands at the same column at different positions."""
        plain = self.signals.plain(signals)
        order = np.argsort(columns[plain > 0], kind="stable")
        columns, plain = columns[plain > 0][order], plain[plain > 0][order]
        alike = columns[1:] == columns[:-1]
        self.signals.couple(plain[1:][alike], plain[:-1][alike])

    def mixes_positions(self, layer: str) -> None:
        """Note that a layer runs over positions."""
        self.layers[layer].mixes_positions = True
        self.signals.pin(self.layers[layer].units, "it is a position")

    def frame(self, tensor: Tensor) -> None:
        """Note units that stand along several axes."""
        small = narrowed(tensor)
        if sum(size > 1 for size in small.shape) < 2 or small.numel() > len(self.signals.kind):
            return
        ids = self.signals.plain(numbers(small))
        if (ids > 0).all() and len(np.unique(ids)) == len(ids):
            shape = [size for size in small.shape if size > 1]
            kept = torch.from_numpy(ids).reshape(shape)
            self.frames.setdefault(repr(shape).encode() + ids.tobytes(), kept)

    def layer_name(self, module: nn.Module, target: str) -> str:
        """Under which name a layer is known: that of its weight's masked layer, or its own."""
        weight = module.parameter if isinstance(module, MaskedLayer) else None
        return self._masked.get(id(weight), target)

    def places(self, part: WeightPart) -> tuple[Tensor, Tensor]:
        """Output unit and input column of every element of a layer's weight."""
        layer = self.layers[part.layer]
        module: Any = self.net.get_submodule(part.layer)
        shape = (module.parameter if isinstance(module, MaskedLayer) else module.weight).shape
        taps = int(np.prod(shape[2:]))
        first, second = part.places // (taps * shape[1]), part.places // taps % shape[1]
        if isinstance(module, _ConvTransposeNd):
            first, second = second, first
        return torch.from_numpy(layer.units)[first], second

    def parameter(self, name: str, tensor: Tensor, beside: Named | None = None) -> Named:
        """A parameter or buffer with a slot per element; it shares those of the one it is always used beside."""
        found = self.parameters.get(id(tensor))
        if found is None:
            slots = beside.ids if beside is not None else None
            if slots is None:
                slots = filled(self.signals.fresh(tensor.numel(), SLOT), tensor.shape)
            found = self.parameters[id(tensor)] = (name, tensor, Named(tensor.detach(), slots))
        return found[2]

    def hold(self, nest: Any, reason: str) -> None:
        """Keep the layers whole whose weights are in `nest`: their units, and all that any use of them is fed."""
        for item in leaves(nest):
            if isinstance(item, WeightPart):
                self._held.setdefault(item.layer, reason)

    def shapes(self, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Shapes of an operation's results, found without values."""
        own = next(self.module.parameters(), None) if isinstance(self.module, nn.Module) else None
        of_ids = self.model_dtype if own is None else own.dtype

        def emptied(item: Any) -> Any:
            if isinstance(item, WeightPart):
                return torch.empty(item.places.shape, dtype=self.model_dtype, device="meta")
            tensor = item.tensor if isinstance(item, (Ids, Named)) else item
            if not isinstance(tensor, Tensor):
                return torch.device("meta") if isinstance(item, torch.device) else item
            dtype = of_ids if isinstance(item, Ids) else tensor.dtype
            return torch.empty(tensor.shape, dtype=dtype, device="meta")

        result = on_meta(op, map_leaves(emptied, args), map_leaves(emptied, kwargs))
        return map_leaves(lambda item: item.shape if isinstance(item, Tensor) else item, result)

    def unknown(self, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What is not understood: all units in it stay, and its results are a mix of them."""
        values = [item for item in leaves((args, kwargs)) if isinstance(item, Ids)]
        reason = f"not followed through {self.place}"
        for value in (*values, *map(Ids, slots_in((args, kwargs)))):
            self.signals.pin(numbers(narrowed(value.tensor)), reason)
        self.hold((args, kwargs), reason)
        mix = whole(self.signals, [value.tensor for value in values])
        try:
            shapes = self.shapes(op, args, kwargs)
        except Exception:  # its shape depends on data
            return Lost()
        return of_shapes(shapes, lambda shape: Ids(torch.tensor(float(mix), dtype=torch.float64).expand(shape)))

    def judged(self, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A comparison or the like: no unit is in its result, whose values are unknown."""
        result = op(*real(args), **real(kwargs))
        return map_leaves(lambda item: Lost() if isinstance(item, Tensor) else item, result)

    # The run

    def run(self, inputs: Sequence[Any]) -> None:
        """Interpret the graph."""
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
            result = _ENDS.begin(self, node, next(waiting, node.args[0] if node.args else None))
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
            return WeightPart(name, torch.arange(shape.numel()).reshape(shape))
        value = getattr(owner, last)
        if not isinstance(value, Tensor):
            return value
        weight = self._weights.get(id(value))
        if weight is not None:
            self.register(weight, self.net.get_submodule(weight))
            return WeightPart(weight, torch.arange(value.numel()).reshape(value.shape))
        named = self.parameter(target, value)
        return Named(named.tensor.clone(), named.ids) if self._writes else named

    def register(self, name: str, module: Any) -> None:
        """A layer's units, where it is not called as usual."""
        if isinstance(module, nn.Linear):
            self.outputs(name, module.out_features, module.in_features)
        elif isinstance(module, nn.MultiheadAttention):
            self.outputs(name, 3 * module.embed_dim, module.embed_dim)
        elif isinstance(module, nn.modules.conv._ConvNd) or hasattr(module, "weight_shape"):
            self.outputs(name, module.out_channels, module.in_channels, module.groups)
        else:
            raise TraceError(f"the weight of `{name}`, a `{type(module).__name__}`, has no known units")

    def _evaluate(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        items = list(leaves((args, kwargs)))
        module = node.op == "call_module"
        self.name = type(self.net.get_submodule(str(node.target))).__name__ if module else short_name(node)
        if _ENDS.selects(self, args, kwargs):
            return _ENDS.lose(self, node, args, kwargs)
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
        path_rule = function_rule(node.target) if node.op == "call_function" else method_rule(str(node.target))
        rule = None
        if path_rule is not None:
            name = maker(path_rule)
            rule = OPERATORS.get(name)
            if rule is None and name == "function_rule":
                return path_rule(self, *args, **kwargs)  # a container is built
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
            _ENDS.pin_layers(self, module, target, "it works on a weight")
            following = any(isinstance(item, Ids) for item in items)
            return (self.unknown if following else self._lost_weight)(meta_module(module), args, kwargs)
        if not any(isinstance(item, Ids) for item in items):
            _ENDS.pin_layers(self, module, target, "it is fed by constants only")
            result = evaluating_copy(module)(*real(args), **real(kwargs))
            tokens = any(isinstance(item, Token) for item in items)
            return _ENDS.source(self, target, result.shape, -1) if tokens and _ENDS.embeds(node, module) else result
        return self.call(module, target, *args, **kwargs)

    def call(self, module: nn.Module, target: str, *args: Any, **kwargs: Any) -> Any:
        """Apply a module's rule."""
        before = self.module, self.target, self.layer, self.applied, self.scales_last
        self.module, self.target, self.layer = module, target, self.layer_name(module, target)
        path_rule = module_rule(module)
        name = "" if path_rule is None else maker(path_rule)
        rule = MODULES.get(name)
        self.applied = row_of(APPLIED, getattr(type(module), "twin_of", type(module))) is not None
        if name == "scale_module":
            self.scales_last = inspect.getclosurevars(path_rule).nonlocals["last"]  # type: ignore[arg-type]

        def op(*inner: Any, **options: Any) -> Any:
            return meta_module(module)(*inner, **options)

        try:
            return self._unknown_module(op, args, kwargs) if rule is None else rule(self, op, *args, **kwargs)
        finally:
            self.module, self.target, self.layer, self.applied, self.scales_last = before

    def _unknown_module(self, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        _ENDS.pin_layers(self, self.module, self.target, f"not followed through {self.place}")
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
            return self._lost_weight(op, args, kwargs)
        result = execute(node, real(args), real(kwargs))
        named = [item for item in leaves((args, kwargs)) if isinstance(item, Named)]
        if any(isinstance(item, Token) for item in named):
            if _ENDS.embeds(node, None):
                return _ENDS.source(self, node.name, result.shape, -1)
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
