"""The path graph: a recorded graph run with every operator replaced by its path rule.

One `PathGraph` is one run, in float64 on an all-ones input. Values that descend from the input are path values and go
through the rule table; everything else is executed unchanged. The run records, per masked layer, the leaf tensors of
magnitudes whose gradients are the scores, and which of the layer's input units lie on a path.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from growfx.errors import TraceError, UnsupportedOperatorError
from growfx.masked.layers import MaskedLayer
from growfx.passes.operators.constants import evaluating_copy, execute
from growfx.passes.operators.names import CASTS, describe, is_moving, short_name, writes_in_place
from growfx.passes.operators.nests import leaves, map_leaves
from growfx.passes.path_products.endings import ended_by, is_selection, placeholder, without_ends
from growfx.passes.path_products.integer_data import embeds, where_data_begins
from growfx.passes.path_products.rules.arithmetic import bounded, identity
from growfx.passes.path_products.rules.table import carries_steps, method_rule, module_rule, node_rule, sees_ends
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import (
    Combined,
    ComparedValue,
    Ended,
    Learned,
    NoPathRuleError,
    PathValue,
    Token,
    Weight,
    is_tensor,
    paths_in,
    raw,
)
from growfx.passes.path_products.weights import changed_weights
from growfx.recorded import graph_ops
from growfx.recorded.inputs import Inputs, tensors_in

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["PathGraph"]

# Live values are rescaled when one passes e^30; float64 ends at e^709, far enough for what one node can do.
_RESCALE_AT = 2.0**43
_SWITCHES = (torch._C._set_grad_enabled, graph_ops.swap_grad_enabled)
_LAYERS = (F.linear, torch.conv1d, torch.conv2d, torch.conv3d)


class PathGraph(PathRun):
    """One run of a network's path graph.

    Args:
        net: the masked graph; its parameters, buffers and modes are read, never changed.
        graph: its recorded evaluation graph for the shapes of the inputs.
        rescale: keep live values near one (exact; off only to test that it is).
        options: as for `PathRun`.

    Attributes:
        total: sum of the outputs, after `run`.
        exponent: true values are the computed ones times 2**exponent.
        ended_fed: layers that were run only on what data selected.
        silent: nodes behind which no path is left, though paths reach them.
    """

    def __init__(self, net: MaskedGraph, graph: fx.Graph, *, rescale: bool = True, **options: Any) -> None:
        super().__init__(net, **options)
        self.graph, self.rescale = graph, rescale
        self.ended_fed: set[str] = set()
        self.silent: list[fx.Node] = []
        self.exponent = 0
        self.total: Tensor | None = None
        self._environment: dict[fx.Node, Any] = {}
        self._ends: list[PathValue] = []
        self._begins: frozenset[fx.Node] = frozenset()
        self._position = {node: position for position, node in enumerate(graph.nodes)}
        self._writes = any(writes_in_place(node) for node in graph.nodes)

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Apply a module's rule."""
        rule = module_rule(module)
        if rule is None:
            raise NoPathRuleError(f"module class `{type(module).__qualname__}` has no path rule")
        return rule(self, module, *args, **kwargs)

    # The run

    def run(self, inputs: Iterable[Any]) -> Any:
        """Interpret the graph; sets `total`. Only shapes and kinds of the inputs count; containers hold several.

        Raises:
            UnsupportedOperatorError: an operator on a path value has no rule.
            TraceError: a value is not finite, a rule cannot be applied, or no path reaches an output.
        """
        given = list(inputs)
        self._begins = where_data_begins(self.net, self.graph, given)
        waiting = iter(given)
        last_use = self._last_uses()
        for node in self.graph.nodes:
            if node.op == "output":
                return self._finish(map_leaves_of(node.args[0], self._environment))
            result = self._input(node, waiting) if node.op == "placeholder" else self._evaluate(node)
            reached = any(value.peak for value in paths_in([self._environment[item] for item in node.all_input_nodes]))
            self._environment[node] = result
            for dead in last_use.get(node, ()):
                self._environment.pop(dead, None)
            self._settle(node, result)
            if reached and _carries_nothing(result):
                self.silent.append(node)
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

    def _input(self, node: fx.Node, waiting: Iterator[Any]) -> Any:
        value = next(waiting, node.args[0] if node.args else None)
        if isinstance(value, (Tensor, list, tuple, dict)) or not any(True for _ in tensors_in(value)):
            return map_leaves(self._start, value)
        return Inputs((value,), {}).copied(self._start).args[0]  # an object that holds tensors

    def _start(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return self._source(value.shape)
        return Token(value.to(self.device)) if value.dtype != torch.bool else value.to(self.device)

    def _source(self, shape: torch.Size) -> PathValue:
        """Units where paths begin, at the scale of the other live values."""
        ones = torch.full(shape, 2.0**-self.exponent, dtype=torch.float64, device=self.device)
        return PathValue(ones.requires_grad_())

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        args = map_leaves_of(node.args, self._environment)
        kwargs = map_leaves_of(node.kwargs, self._environment)
        if node.target is getattr and not is_tensor(args[0]):
            return getattr(raw(args[0]), args[1])  # of an object among the inputs
        if node.op == "call_module" or node.target in _LAYERS:
            args, kwargs = self._stepped(args), self._stepped(kwargs)
        try:
            if is_selection(node, args, kwargs):
                return self._select(node, args, kwargs)
            if paths_in(args, kwargs):
                return self._apply(node, args, kwargs)
            with torch.no_grad():
                return self._without_paths(node, args, kwargs)
        except NoPathRuleError as reason:
            raise UnsupportedOperatorError(
                f"no path rule for {describe(node)}: {reason}. Path products need a rule for every operator between "
                "input and output; rewrite the operator with supported ones (the tables of "
                "`growfx.passes.path_products.rules` list them)"
            ) from None
        except (TraceError, torch.OutOfMemoryError):
            raise
        except Exception as problem:
            raise TraceError(f"the path rule of {describe(node)} failed: {problem}") from problem

    def _stepped(self, nest: Any) -> Any:
        """Steps that go on as data: spikes, signs. What a layer reads of them carries the paths of what was compared.

        Elsewhere a comparison decides, and paths end there.
        """

        def carried(item: Any) -> Any:
            if not isinstance(item, ComparedValue) or not item.tensor.is_floating_point():
                return item
            return item.carried() or ComparedValue(item.tensor.to(self.model_dtype), item.sources)

        return map_leaves(carried, nest)

    def _apply(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            args, kwargs = without_ends((args, kwargs), self.device)
            return self.call(self.net.get_submodule(str(node.target)), *args, **kwargs)
        if node.op == "call_method" and not is_tensor(args[0]):
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)  # a method of a container
        self._check_write(node)
        rule = node_rule(node)
        if not args and "input" in kwargs:
            args, kwargs = (
                (kwargs["input"],),
                {name: item for name, item in kwargs.items() if name != "input"},
            )
        if rule is None:
            raise NoPathRuleError("the operator is not in the table")
        if not (sees_ends(rule) or isinstance(node.target, type)):  # nor when they are put into a container
            args, kwargs = without_ends((args, kwargs), self.device)
        return rule(self, *args, **kwargs)

    def _select(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Data decides what the node takes: what it takes from and decides by are outputs, the result is ended."""
        self._end(ended_by(node, args, kwargs))
        return placeholder(node, args, kwargs, self.model_dtype)

    def _end(self, values: Iterable[PathValue]) -> None:
        """Let paths end at values, as at outputs of the network."""
        for value in values:
            if not any(value.tensor is known.tensor for known in self._ends):
                self._ends.append(value)

    def _without_paths(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = list(leaves((args, kwargs)))
        if any(isinstance(item, Ended) for item in inputs):
            if node.op == "call_module":
                self._note_fed(self.ended_fed, self.net.get_submodule(str(node.target)))
            self.ended_fed.update(item.layer for item in inputs if isinstance(item, Weight))
            return self._select(node, args, kwargs)
        sources = tuple(source for item in inputs if isinstance(item, ComparedValue) for source in item.sources)
        result = self._constant(node, args, kwargs)
        if not sources:
            return result
        if self._embeds(node):  # codes chosen by data (a quantiser's): paths end at the choice, and begin at the codes
            self._end(sources)
            with torch.enable_grad():
                return self._source(raw(result).shape)
        steps = leaves(self._moved_steps(node, args, kwargs))

        def compared(item: Any) -> Any:
            step = next(steps, None)
            if isinstance(item, ComparedValue) or not isinstance(raw(item), Tensor):
                return item
            return ComparedValue(raw(item), sources, step if isinstance(step, PathValue) else None)

        return map_leaves(compared, result)

    def _moved_steps(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What steps carry that the node moves, joins or averages; () where it does something else with them."""
        if not carries_steps(node.op, node.target):
            return ()
        rule = node_rule(node)
        given = map_leaves(
            lambda item: item.carried() or item if isinstance(item, ComparedValue) else item, (args, kwargs)
        )
        if rule is None or not paths_in(given):
            return ()
        try:
            with torch.enable_grad():
                moved = rule(self, *given[0], **given[1])
        except NoPathRuleError:
            return ()
        for value in paths_in(moved):
            value.peak = _largest(value.tensor.detach())
        return moved

    def _check_write(self, node: fx.Node) -> None:
        """Refuse to write into a part of a path value whose whole is read again: the whole would miss the write."""
        if not writes_in_place(node) or method_rule(str(node.target)) in (identity, bounded):
            return
        source = node.args[0]
        while isinstance(source, fx.Node) and is_moving(source.op, source.target) and source.target != "clone":
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
        name = self.layer_at(value)
        if name is not None:
            return Weight(name, self.signed(self.layers[name]))
        if self._writes and isinstance(value, Tensor):
            copied = value.detach().clone()  # the graph writes into tensors; the network's own stay as they are
            return Learned(copied) if isinstance(value, nn.Parameter) else copied
        return Learned(value.detach()) if isinstance(value, nn.Parameter) else value

    def _constant(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Execute a node without path values, leaving every parameter, buffer and mode unchanged."""
        if node.target in _SWITCHES:
            return True
        if node.target is operator.getitem and isinstance(args[0], (tuple, list, dict)):
            return args[0][raw(args[1])]
        inputs = list(leaves((args, kwargs)))
        token = any(isinstance(item, Token) for item in inputs)
        if node.op == "call_module":
            module = self.net.get_submodule(str(node.target))
            self._note_fed(self.constant_fed, module)
            result = evaluating_copy(module)(*raw(args), **raw(kwargs))
            learned = next(module.parameters(), None) is not None
        else:
            alike = (
                short_name(node) in CASTS
                and not any(  # of a weight's type
                    isinstance(item, (Weight, Combined)) for item in (*args[:1], kwargs.get("input"))
                )
            )
            if not alike and any(isinstance(item, (Weight, Combined)) for item in inputs):
                return changed_weights(self, node, args, kwargs)
            result = execute(node, raw(args), raw(kwargs))
            learned = any(isinstance(item, Learned) for item in inputs)
        if node in self._begins or (token and self._embeds(node)):
            with torch.enable_grad():
                return map_leaves(self._begun, result)
        kind = Token if token else Learned
        return map_leaves(lambda item: kind(item) if isinstance(item, Tensor) and (learned or token) else item, result)

    def _begun(self, item: Any) -> Any:
        return self._source(item.shape) if isinstance(item, Tensor) and item.is_floating_point() else item

    def _embeds(self, node: fx.Node) -> bool:
        return embeds(node, self.net.get_submodule(str(node.target)) if node.op == "call_module" else None)

    def _note_fed(self, fed: set[str], module: nn.Module) -> None:
        fed.update(name for part in module.modules() if (name := self.layer_of(part)) is not None)

    def _settle(self, node: fx.Node, result: Any) -> None:
        """Check the node's values and bring all live values back towards one where needed."""
        peak = 0.0
        for value in paths_in(result):
            if value.peak is None:
                value.peak = _largest(value.tensor.detach())
            if not math.isfinite(value.peak):
                raise TraceError(
                    f"the path value of {describe(node)} is not finite ({value.peak}); look for infinite or nan "
                    "weights, norm scales or running variances before it"
                )
            peak = max(peak, value.peak)
        if not self.rescale or peak == 0 or 1 / _RESCALE_AT <= peak <= _RESCALE_AT:
            return
        live = {id(value): value for value in self._live() if not value.divisor}
        largest = max((value.peak or 0.0 for value in live.values()), default=0.0)
        # Up only when everything is small: otherwise two branches of different size would chase each other.
        if largest > _RESCALE_AT or 0 < largest < 1 / _RESCALE_AT:
            self._scale(live.values(), -math.frexp(largest)[1])

    def _live(self) -> Iterator[PathValue]:
        """Path values that are still to be used, if only as outputs."""
        yield from self._ends
        for item in leaves(list(self._environment.values())):
            if isinstance(item, PathValue):
                yield item
            elif isinstance(item, ComparedValue):
                yield from item.sources
                if item.step is not None:
                    yield item.step

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
        known = {id(value.tensor) for value in self._ends}
        outputs = [value for value in paths_in(output) if id(value.tensor) not in known]
        values = [value for value in (*self._ends, *outputs) if not value.divisor]
        if not values:  # a network of spikes to the end: its rates
            values = [step for item in leaves(output) if isinstance(item, ComparedValue) and (step := item.carried())]
        if not values:
            raise TraceError("no path leads from the network's input to its output; path products need one")
        self.total = torch.stack([value.tensor.sum() for value in values]).sum()
        self._environment.clear()
        self._ends.clear()
        return output


def _carries_nothing(result: Any) -> bool:
    values = [value for value in paths_in(result) if value.tensor.numel() and not value.divisor]
    return bool(values) and not any(value.peak for value in values)


def _largest(tensor: Tensor) -> float:
    """The largest element; one where there are no values, zero where there is nothing."""
    if not tensor.numel():
        return 0.0
    return 1.0 if tensor.is_meta else float(tensor.amax())


def map_leaves_of(nest: Any, environment: dict[fx.Node, Any]) -> Any:
    """Node arguments with values in place of nodes."""
    return map_arg(nest, lambda node: environment[node])
