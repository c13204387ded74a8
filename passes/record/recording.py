"""Record a model by running it once: every operator it executes becomes a node of an ordinary torch.fx graph.

Nothing is traced symbolically, so whatever Python the forward holds (loops, branches on shapes, lists, keyword
arguments, functional uses of weights) is simply executed. Convolutions, linear layers, norms, attention and
childless `torch.nn` modules become nodes; every other module is recorded through. Sizes are numbers
that remember their node, which keeps the batch size free; other sizes hold for the recorded input only.

A value that Python takes out of a tensor computed from the input (`.item()`, a branch on data) cannot be
recorded: the innermost module doing so is named by `DataDependentError` and can be recorded whole, as one node.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from growfx.masked.isolation import caches_bypassed, generators_restored, tables_restored
from growfx.masked.layers import MaskedLayer
from growfx.masked.module_copy import copy_modules, separate_hooks
from growfx.masked.weight_reads import ModelCode
from growfx.passes.record.call import all_can_be_written, is_own_or_torch
from growfx.passes.record.data import DataDependentError, NeedsValuesError, RefusedInputsError
from growfx.passes.record.hooks import HookChangesValuesError
from growfx.passes.record.recorder import Recorder
from growfx.recorded import graph_ops
from growfx.recorded.inputs import Inputs, tensors_in

__all__ = ["DataDependentError", "NeedsValuesError", "Recording", "cuda_devices", "meta_copy", "record", "working_copy"]


@dataclasses.dataclass
class Recording:
    """A recorded forward.

    Attributes:
        graph: nodes in order of execution; `call_module` and `get_attr` targets are names in the recorded module.
        called: names of the modules that were called, leaves and others, in order of their first call, and of
            those whose parameter was used without a call.
        output: what the recorded run returned.
        read: names of masked layers whose weight was used without a call of the layer.
        used: names of the parameters that no mask, embedding or norm accounts for -> the operator inside a module
            recorded whole that used it, or "".
        own_gradient: whether the gradient may be another than that of the operators in the graph.
        side_effects: what the forward did besides returning a value, one phrase each.
        left_out: classes of returned objects that the graph leaves out.
        writes_parameters: whether the forward changed a parameter, or may have.
        branches: values read from data that the graph holds for alone, one phrase each.
    """

    graph: fx.Graph
    called: list[str]
    output: Any
    read: list[str]
    used: dict[str, str]
    own_gradient: bool
    side_effects: list[str]
    left_out: list[str]
    writes_parameters: bool
    branches: list[str]


# Recording replaces `nn.Module.__call__` for as long as it takes: one at a time in a process.
_ONE_AT_A_TIME = threading.RLock()


def record(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    opaque: Iterable[str] = (),
    allow_data: bool = False,
    run_on: nn.Module | None = None,
    without_values: bool = False,
    look_inside: bool = False,
    pinned: bool = False,
) -> Recording:
    """Run ``module(*args, **kwargs)`` once and return what it did as a graph.

    Other threads may call modules meanwhile, this one included; generators, caches and the arguments are left as they
    were, and so is `module` where a copy runs in its place.

    Args:
        module: any module, in the mode (train or eval) to be recorded; a copy of it is run.
        args: positional inputs; tensors in nested lists, tuples, dicts and objects become inputs of the graph.
        kwargs: keyword inputs.
        opaque: names of submodules to record as one node each, without looking inside.
        allow_data: bake values that Python takes out of data instead of raising `DataDependentError`.
        run_on: the copy to run; made when not given.
        without_values: it is a `meta_copy`: shapes alone are computed, which costs a fraction.
        look_inside: in eval mode, record what autograd functions compute instead of their application.
        pinned: take values that the model's own forward, not a submodule's, reads from data computed from the input as
            constants; the graph checks each of them.

    Raises:
        TraceError: the forward itself failed; names the module and the source line.
        DataDependentError: see above.
        NeedsValuesError: the run on the meta copy failed; the module itself may well run.
    """
    with _ONE_AT_A_TIME:
        root = working_copy(module) if run_on is None else run_on
        recorder = Recorder(root, frozenset(opaque), allow_data, module, without_values, look_inside, pinned)
        return _recorded(recorder, Inputs(args, dict(kwargs or {})))


def _recorded(recorder: Recorder, given: Inputs) -> Recording:
    root, without_values = recorder.root, recorder.without_values
    given = given.copied(_to_meta if without_values else torch.clone)
    inputs = recorder.placeholders(given.args, dict(given.kwargs))
    before = _attributes(root), _contents(inputs)
    try:
        with _quiet(recorder), _intercepted_calls(recorder), recorder:
            output = root(*inputs[0], **inputs[1])
    except DataDependentError:
        raise
    except Exception as error:
        if without_values:
            raise NeedsValuesError(str(error)) from error
        where = f" in module `{recorder.failed_in}`" if recorder.failed_in else ""
        source = _source_of_error(error)
        shapes = [tuple(a.shape) for a in given.values if isinstance(a, Tensor)]
        raise RefusedInputsError(
            f"`{type(recorder.home).__name__}` fails on inputs of shape {shapes}{where} ({source}): "
            f"{type(error).__name__}: {error}",
            "Pass inputs that the model accepts (`example_inputs` of `growfx.wrap`).",
        ) from error
    recorder.graph.output(recorder.as_argument(output, build=True))
    _drop_unused_numbers(recorder.graph)
    _drop_unseen_writes(recorder.graph)
    return Recording(
        recorder.graph,
        list(recorder.called),
        output,
        list(recorder.read),
        dict(recorder.used),
        recorder.own_gradient,
        _changes(before, (_attributes(root), _contents(inputs))),
        list(dict.fromkeys(recorder.left_out)),
        recorder.writes_parameters,
        list(dict.fromkeys(recorder.branches)),
    )


@contextmanager
def _quiet(recorder: Recorder) -> Generator[None]:
    """Leave generators, caches and tables as they were; stop where Python's own generators decide."""
    root = recorder.root
    with (
        generators_restored(cuda_devices(recorder.home), root),
        caches_bypassed(root),
        tables_restored(root, recorder.home),
        ModelCode(None),  # masked weights are the recorder's concern
        torch.enable_grad(),  # as a training step has it, so that switches of it are seen
        _default_device(recorder),
    ):
        recorder.check_randomness(allowed=True)
        yield
        recorder.check_randomness()


def cuda_devices(module: nn.Module) -> list[int]:
    """The CUDA devices that a module has tensors on."""
    if not torch.cuda.is_initialized():
        return []
    tensors = chain(module.parameters(), module.buffers())
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


def _attributes(root: nn.Module) -> dict[str, int]:
    """Ids of what modules hold in attributes and buffers, by name; numbers and texts by value."""
    found: dict[str, Any] = {}
    for name, module in root.named_modules():
        for key, value in (*vars(module).items(), *module._buffers.items()):
            if key not in _REGISTRIES:
                plain = isinstance(value, (bool, int, float, str))
                found[f"{name}.{key}".lstrip(".")] = value if plain else id(value)
                if isinstance(value, (list, dict, set)):
                    found[f"{name}.{key}[]".lstrip(".")] = len(value)
    return found


_REGISTRIES = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "_stored"}


def _contents(inputs: Any) -> dict[str, Any]:
    """Ids of what containers and objects among the inputs hold."""
    found: dict[str, Any] = {}

    def walk(value: Any, name: str, depth: int) -> None:
        if isinstance(value, dict):
            items: Any = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        elif hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module, type)):
            items = vars(value).items()
        else:
            return
        for key, item in list(items):
            found[f"{name}[{key}]"] = id(item)
            if depth < 4:
                walk(item, f"{name}[{key}]", depth + 1)

    walk(inputs[0], "args", 0)
    walk(inputs[1], "kwargs", 0)
    return found


def _changes(before: tuple[dict[str, Any], ...], after: tuple[dict[str, Any], ...]) -> list[str]:
    """What a forward changed: attributes and buffers that it assigned, arguments that it wrote into."""
    differing = [
        {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)} for old, new in zip(before, after, strict=True)
    ]
    changed = sorted({name.removesuffix("[]") for name in differing[0]})
    found = [f"assigns `{name}`" for name in changed]
    return [*found, "writes into its arguments"] if differing[1] else found


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of the module on the meta device, in the module's mode: it computes shapes and holds no values."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [value for part in module.modules() for value in tensors_in(_plain_attributes(part))]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    copied = copy_modules(module, memo)
    separate_hooks(copied)
    return copied


def working_copy(module: nn.Module, *, trained: bool = False, own_values: bool = False) -> nn.Module:
    """A copy of the module to run: values are shared, buffers and attributes are its own, as are what hooks keep.

    Its parameters are other objects over the same memory; they require gradients where the module's do if `trained`.
    `own_values`: they have their own memory, for forwards that write into them.
    """
    memo: dict[int, Any] = {id(part.mask): part.mask for part in module.modules() if isinstance(part, MaskedLayer)}
    for parameter in module.parameters():
        values = parameter.detach().clone() if own_values else parameter.detach()
        memo[id(parameter)] = nn.Parameter(values, requires_grad=trained and parameter.requires_grad)
    copied = copy_modules(module, memo)
    separate_hooks(copied)
    return copied


def _plain_attributes(module: nn.Module) -> list[Any]:
    return [
        v for k, v in vars(module).items() if isinstance(v, Tensor) or (type(v) in (list, tuple, dict) and k[0] != "_")
    ]


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _default_device(recorder: Recorder) -> AbstractContextManager[Any]:
    """On a meta copy, tensors made without naming a device go where the module's own would go: to its device."""
    on_meta = recorder.without_values and recorder.device == torch.get_default_device()
    return torch.device("meta") if on_meta else nullcontext()


@contextmanager
def _intercepted_calls(recorder: Recorder) -> Generator[None]:
    """Every module call of this thread passes the recorder; those of others pass by."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = recorder.module_names.get(id(module)) if threading.get_ident() == recorder.thread else None
        if name is None:
            return original(module, *args, **kwargs)
        recorder.called.setdefault(name)
        recorder.running.append(module)
        inside = recorder.inside_leaf
        if not inside:
            recorder.check_randomness()
            recorder.stack.append(name)
        try:
            if inside:
                return original(module, *args, **kwargs)
            if recorder.is_leaf(module, name):
                with suppress(HookChangesValuesError):
                    value = recorder.call_leaf(original, module, name, args, kwargs)
                    recorder.check_randomness(allowed=True)
                    return value
            value = original(module, *args, **kwargs)
            recorder.check_randomness()
            return value
        except Exception:
            recorder.failed_in = recorder.failed_in or name
            raise
        finally:
            recorder.running.pop()
            if not inside:
                recorder.stack.pop()

    nn.Module.__call__ = call
    try:
        with _intercepted_functions(recorder):
            yield
    finally:
        nn.Module.__call__ = original


@contextmanager
def _intercepted_functions(recorder: Recorder) -> Generator[None]:
    """An autograd function is one operator, or the gradient its author wrote would be lost.

    Where passes are to follow what it computes it is looked into; and wherever it takes functions, or what a graph
    cannot hold. `f = MyFunction.apply`, bound when its module was imported, passes by the class's `apply`
    but not by its `forward`.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def is_whole(args: Any, kwargs: Any) -> bool:
        if threading.get_ident() != recorder.thread or recorder.inside_leaf:
            return False
        recorder.own_gradient = True
        whole = all_can_be_written((args, kwargs)) and not any(map(callable, pytree.tree_leaves(args)))
        return whole and not recorder.look_inside

    def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
        function = original.__get__(None, kind)
        if not is_whole(args, kwargs):
            return function(*args, **kwargs)
        return recorder.as_one_node("call_function", graph_ops.applied(kind), function, args, kwargs)

    def forward_of(kind: type[torch.autograd.Function], own: Callable[..., Any]) -> Callable[..., Any]:
        takes_context = kind.setup_context is torch.autograd.Function.setup_context

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            context, given = (args[:1], args[1:]) if takes_context else ((), args)
            if not is_whole(given, kwargs):
                return own(*args, **kwargs)

            def run(*args: Any, **kwargs: Any) -> Any:
                return own(*context, *args, **kwargs)

            return recorder.as_one_node("call_function", graph_ops.applied(kind), run, given, kwargs)

        return forward

    torch.autograd.Function.apply = classmethod(apply)
    patched: list[tuple[type, Any]] = []
    try:
        for kind in _autograd_functions():
            own = kind.__dict__["forward"]
            patched.append((kind, own))
            setattr(kind, "forward", staticmethod(forward_of(kind, own.__func__)))  # noqa: B010 - not a known attribute
        yield
    finally:
        torch.autograd.Function.apply = original
        for kind, own in patched:
            setattr(kind, "forward", own)  # noqa: B010


def _autograd_functions() -> list[type[torch.autograd.Function]]:
    """The autograd functions that models may use, not torch's own."""
    found: dict[type, None] = {}
    waiting = list(torch.autograd.Function.__subclasses__())
    while waiting:
        kind = waiting.pop()
        if kind in found:
            continue
        found[kind] = None
        waiting += kind.__subclasses__()
    return [
        kind
        for kind in found
        if isinstance(kind.__dict__.get("forward"), staticmethod)
        and not kind.__module__.startswith(("torch.", "growfx."))
    ]


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
        if not node.users and (node.target is graph_ops.set_item or node.meta.get("carried_back")):
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
