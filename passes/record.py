"""Record a model by running it once: every operator it executes becomes a node of an ordinary torch.fx graph.

Nothing is traced symbolically, so whatever Python the forward holds (loops, branches on shapes, lists, keyword
arguments, functional uses of weights) is simply executed. Convolutions, linear layers, norms, attention and
childless `torch.nn` modules are nodes of their own; every other module is recorded through. Sizes are numbers
that remember their node, which keeps the batch size free; other sizes hold for the recorded input only.

A value that Python takes out of a tensor computed from the input (`.item()`, a branch on data) cannot be
recorded: the innermost module doing so is named by `DataDependentError` and can be recorded whole, as one node.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from growfx import graph_ops
from growfx.errors import TraceError
from growfx.module_copy import copy_modules
from growfx.recorded_call import all_can_be_written, is_own_or_torch
from growfx.recorder import DataDependentError, NeedsValuesError, Recorder

__all__ = ["DataDependentError", "NeedsValuesError", "Recording", "meta_copy", "record"]


@dataclasses.dataclass
class Recording:
    """A recorded forward.

    Attributes:
        graph: nodes in order of execution; `call_module` and `get_attr` targets are names in the recorded module.
        called: names of the modules that were called, leaves and others, in order of their first call, and of
            those whose parameter was used without a call.
        output: what the recorded run returned.
    """

    graph: fx.Graph
    called: list[str]
    output: Any


def record(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    opaque: Iterable[str] = (),
    allow_data: bool = False,
    run_on: nn.Module | None = None,
) -> Recording:
    """Run ``module(*args, **kwargs)`` once and return what it did as a graph.

    Args:
        module: any module, in the mode (train or eval) to be recorded. Its buffers may change, as in any forward.
        args: positional inputs; tensors in nested lists, tuples and dicts become inputs of the graph.
        kwargs: keyword inputs.
        opaque: names of submodules to record as one node each, without looking inside.
        allow_data: bake values that Python takes out of data instead of raising `DataDependentError`.
        run_on: a `meta_copy` of the module to run in its place: shapes alone are computed, which costs a fraction.

    Raises:
        TraceError: the forward itself failed; names the module and the source line.
        DataDependentError: see above.
        NeedsValuesError: the run on the meta copy failed; the module itself may well run.
    """
    root = module if run_on is None else run_on
    recorder = Recorder(root, frozenset(opaque), allow_data, module)
    if run_on is not None:
        args, kwargs = _to_meta((args, dict(kwargs or {})))
    inputs = recorder.placeholders(args, dict(kwargs or {}))
    try:
        with _without_gradients(root), _default_device(recorder), _intercepted_calls(recorder), recorder:
            output = root(*inputs[0], **inputs[1])
    except DataDependentError:
        raise
    except Exception as error:
        if run_on is not None:
            raise NeedsValuesError(str(error)) from error
        where = f" in module `{recorder.failed_in}`" if recorder.failed_in else ""
        source = _source_of_error(error)
        shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
        raise TraceError(
            f"`{type(module).__name__}` fails on inputs of shape {shapes}{where} ({source}): "
            f"{type(error).__name__}: {error}. Pass inputs that the model accepts (`example_inputs` of `growfx.wrap`)."
        ) from error
    recorder.graph.output(recorder.as_argument(output, build=True))
    _drop_unused_numbers(recorder.graph)
    _drop_unseen_writes(recorder.graph)
    return Recording(recorder.graph, list(recorder.called), output)


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of the module on the meta device, in the module's mode: it computes shapes and holds no values."""
    tensors = [*chain(module.parameters(), module.buffers())]
    tensors += [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy_modules(module, memo)


def _to_meta(nest: Any) -> Any:
    return pytree.tree_map(lambda value: value.to("meta") if isinstance(value, Tensor) else value, nest)


def _default_device(recorder: Recorder) -> AbstractContextManager[Any]:
    """On a meta copy, tensors made without naming a device go where the module's own would go: to its device."""
    on_copy = recorder.home is not recorder.root
    return torch.device("meta") if on_copy and recorder.device == torch.get_default_device() else nullcontext()


@contextmanager
def _intercepted_calls(recorder: Recorder) -> Generator[None]:
    """Every module call passes the recorder; only one recording runs at a time in a process."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = recorder.module_names.get(id(module))
        if name is None:
            return original(module, *args, **kwargs)
        recorder.called.setdefault(name)
        if recorder.inside_leaf:
            return original(module, *args, **kwargs)
        recorder.stack.append(name)
        try:
            if recorder.is_leaf(module, name):
                return recorder.call_leaf(original, module, name, args, kwargs)
            return original(module, *args, **kwargs)
        except Exception:
            recorder.failed_in = recorder.failed_in or name
            raise
        finally:
            recorder.stack.pop()

    nn.Module.__call__ = call
    try:
        with _intercepted_functions(recorder):
            yield
    finally:
        nn.Module.__call__ = original


@contextmanager
def _intercepted_functions(recorder: Recorder) -> Generator[None]:
    """In train mode an autograd function is one operator, or the gradient its author wrote would be lost.

    In eval mode it is looked into, for path products to follow what it computes; and wherever it takes functions, or
    what a graph cannot hold.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
        function = original.__get__(None, kind)
        whole = all_can_be_written((args, kwargs)) and not any(map(callable, pytree.tree_leaves(args)))
        if recorder.inside_leaf or not recorder.root.training or not whole:
            return function(*args, **kwargs)
        return recorder.as_one_node("call_function", graph_ops.applied(kind), function, args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = original


@contextmanager
def _without_gradients(module: nn.Module) -> Generator[None]:
    """Grad mode on, as a training step has it, so that switches of it are seen; but nothing that requires gradients."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _drop_unused_numbers(graph: fx.Graph) -> None:
    """Remove sizes and parts of containers nobody reads; everything else stays, as it ran."""
    for node in reversed(graph.nodes):
        is_part = node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"
        if not node.users and (node.meta.get("number") or is_part or node.op == "get_attr"):
            graph.erase_node(node)


def _drop_unseen_writes(graph: fx.Graph) -> None:
    """Where nobody reads the whole after a write into its part, write into the part itself, as the model did."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in reversed(graph.nodes):
        if not node.users and (node.target is graph_ops.set_item or node.target == "reshape_as"):
            graph.erase_node(node)
    for node in graph.nodes:
        if node.meta.get("for_write") and all(
            position[user] <= position[node] for source in _chain(node.args[0]) for user in source.users
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _chain(node: Any) -> Iterator[fx.Node]:
    """A part, what it was taken from, and so on."""
    while isinstance(node, fx.Node):
        yield node
        if node.target is not operator.getitem and node.op != "call_method":
            return
        node = node.args[0]


def _source_of_error(error: BaseException) -> str:
    source, traceback = "", error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not is_own_or_torch(code.co_filename):
            source = f"{code.co_filename}:{traceback.tb_lineno} in {code.co_name}"
        traceback = traceback.tb_next
    return source or "source unknown"
