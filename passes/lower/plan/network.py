"""Plan a whole network for the native runtime."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from growfx.errors import TraceError, UnsupportedOperatorError
from growfx.passes.lower.plan.builder import Builder, NoKernelError, is_empty
from growfx.passes.lower.plan.calls import Calls, record_calls, record_operators
from growfx.passes.lower.plan.fuse import fold_factors, fuse_chains, fuse_gates, merge_views
from growfx.passes.lower.plan.graph import Graph, Node
from growfx.passes.lower.plan.memory import planned
from growfx.passes.lower.plan.repeats import look_up_repeats
from growfx.passes.lower.plan.rules import RULES
from growfx.passes.lower.state import kept_state
from growfx.recorded.inputs import Inputs
from growfx.runtime.native.plan import Constant, Plan

__all__ = ["ConstantMasks", "missing_kernels", "plan_network", "plan_of", "unknown_operators"]


def plan_network(model: nn.Module, masks: Mapping[str, Tensor], inputs: Inputs) -> Plan:
    """The steps of a network for any batch size, norms folded into weights, chains fused, memory planned.

    Args:
        model: a plain model in evaluation mode with values in float32 on the CPU.
        masks: name of a parameter -> bool tensor of its shape; what is false is not stored.
        inputs: example inputs, as the model is called.

    Raises:
        UnsupportedOperatorError: operators without a kernel; names them all.
        TraceError: the operators depend on the data, or a call changes its inputs or the model.
    """
    calls = record_calls(model, inputs)
    kept = kept_state(model, inputs)
    if kept:
        named = ", ".join(f"`{name}`" for name in kept)
        raise TraceError(f"every call of the network changes {named}, which a native run would not")
    builder, missing = _built(calls, ConstantMasks(model, masks))
    if missing:
        named = ", ".join(f"`{name}`" for name in missing)
        raise UnsupportedOperatorError(
            f"the native runtime has no kernel for {named}, which the network computes; run it with `growfx.load`"
        )
    graph = builder.finished()
    graph.drop_unused()
    if any(is_empty(node.shape) for node in graph.nodes):
        raise TraceError(
            "the network computes with a tensor without elements, which the native runtime does not; run it with "
            "`growfx.load`"
        )
    return plan_of(graph, small=True)


def plan_of(graph: Graph, *, small: bool = False) -> Plan:
    """The plan of a graph, which is changed: norms folded into weights, chains fused, memory planned.

    `small`: constants that repeat themselves become tables, as a file wants it.
    """
    graph.drop_unused()
    folded = fold_factors(graph)
    merge_views(graph)
    fuse_chains(graph)
    fuse_gates(graph)
    if small:
        look_up_repeats(graph)
    graph.drop_unused()
    return planned(graph, folded)


def missing_kernels(model: nn.Module, inputs: Inputs) -> Counter[str]:
    """The operators of a network that have no kernel, and how often each is called.

    Raises:
        TraceError: as of `plan_network`.
    """
    return _built(record_calls(model, inputs), ConstantMasks(model, {}))[1]


def unknown_operators(model: nn.Module, inputs: Inputs) -> Counter[str]:
    """The operators of a network that no rule knows, and how often each is called, from a single run.

    A quick look: the model and its inputs may be on the meta device, and forms of an operator that its rule refuses are
    not told, as `missing_kernels` does.

    Raises:
        TraceError: the operators depend on the data.
    """
    return Counter(name for name in record_operators(model, inputs) if name not in RULES)


def _built(calls: Calls, masks: ConstantMasks) -> tuple[Builder, Counter[str]]:
    builder, missing = Builder(calls, masks.of, RULES), Counter[str]()
    lost, unmade = set[int](), dict[int, str]()
    for call in calls.calls:
        name = call.operator
        shapes = [calls.shapes[number] for number in call.results if number is not None]
        rule = RULES.get(name)
        try:
            if rule is None:
                raise NoKernelError("")
            read = _read_of(call.arguments, lost) if lost else None
            if read is not None:
                lost.update(number for number in call.results if number is not None)
                if read in unmade:
                    unmade |= {number: unmade[read] for number in call.results if number is not None}
                continue
            made = rule(builder, call.arguments, shapes)
        except NoKernelError as reason:
            missing[f"{name} {reason}".strip()] += 1
            lost.update(number for number in call.results if number is not None)
            continue
        listed = [made] if isinstance(made, (Node, Constant)) else made
        for number, operand in itertools.zip_longest(call.results, listed):
            if number is not None and operand is not None:
                builder.keep(number, operand)
            elif number is not None:  # indices of a maximum, say, which most networks do not use
                lost.add(number)
                unmade[number] = name
    missing.update(f"{unmade[n]} with further results than the first" for n in calls.outputs if n in unmade)
    return builder, missing


def _read_of(arguments: object, lost: set[int]) -> int | None:
    """The first tensor that a call reads and that could not be computed."""
    from growfx.passes.lower.plan.calls import Reference
    from growfx.passes.operators.nests import leaves

    return next((x.number for x in leaves(arguments) if isinstance(x, Reference) and x.number in lost), None)


class ConstantMasks:
    """Masks of constants that are views of masked parameters."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        for name, mask in masks.items():
            parameter = model.get_parameter(name)
            # The mask in the parameter's own order in memory, so that a view of one is a view of the other.
            laid = torch.empty_like(parameter, dtype=torch.bool).copy_(mask)
            self._known[parameter.untyped_storage().data_ptr()] = (parameter.detach(), laid)

    def of(self, tensor: Tensor) -> Tensor | None:
        """The mask of a tensor; None where all of it counts."""
        parameter, mask = self._known.get(tensor.untyped_storage().data_ptr(), (None, None))
        if parameter is None or mask is None or tensor.dtype != parameter.dtype:
            return None
        offset = tensor.storage_offset() - parameter.storage_offset()
        return mask.as_strided(tensor.shape, tensor.stride(), offset)
