"""The recording under way: a TorchFunctionMode that writes down every operator as a torch.fx node."""

from __future__ import annotations

import dataclasses
import functools
import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from growfx.distributed.sharded import is_sharded
from growfx.masked.isolation import own_generators, python_randomness
from growfx.masked.layers import MaskedLayer
from growfx.passes.operators.names import changes_in_place
from growfx.passes.record.call import (
    all_can_be_written,
    can_be_written,
    contents,
    forward_parameters,
    holds_tensor,
    operation,
    plain_arguments,
    plain_tensor_names,
    source_line,
)
from growfx.passes.record.data import DataDependentError, DataSizes, NeedsValuesError, has_input
from growfx.passes.record.hooks import has_forward_hooks, without_changes
from growfx.passes.record.meta_shapes import function_shapes, module_shapes
from growfx.passes.record.numbers import TracedFloat, TracedInt, plain, traced
from growfx.passes.record.parts import MovedAxes, Parts, are_apart
from growfx.passes.record.whole import is_one_operator
from growfx.recorded import graph_ops
from growfx.recorded.recording import RECORDED_CONSTANT

__all__ = ["Recorder"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_DATA_TO_PYTHON = {
    "__array__", "__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__", "allclose", "equal",
    "is_nonzero", "item", "numpy", "tolist",
}  # fmt: skip
_ARRAYS = {"__array__", "numpy"}
# Draw random numbers; what a module of dropout draws is drawn in its own node.
_RANDOM = {
    "alpha_dropout", "bernoulli", "bernoulli_", "cauchy_", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "exponential_", "feature_alpha_dropout", "geometric_", "gumbel_softmax", "log_normal_", "multinomial", "normal",
    "normal_", "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "randperm",
    "uniform_",
}  # fmt: skip
_WRITES = {"__array__", "__dlpack__", "__setitem__", "data_ptr", "numpy", "untyped_storage"}
_GRADIENT_HOOKS = {"register_hook", "register_post_accumulate_grad_hook"}
_ON_DEVICE = {"is_meta": "meta", "is_cpu": "cpu", "is_cuda": "cuda", "is_mps": "mps", "is_xpu": "xpu"}
_NO_VALUE = {"_assert", "_assert_async", "_log_api_usage_once"}


class Recorder(TorchFunctionMode):
    """The recording under way.

    Args:
        root: the module that is run.
        opaque: names of submodules that become one node each.
        allow_data: bake values that Python takes out of data.
        home: the module the graph is for, where `root` is a copy of it.
        without_values: `root` is on the meta device though `home` is not.
        look_inside: record what autograd functions compute, not their application, in eval mode.
        pinned: where the model's own forward takes values out of data computed from the input, take them as constants
            and let the graph check them.

    Attributes:
        graph: what was recorded.
        called: names of the modules that were called, and of those whose weight was used without a call.
        read: names of masked layers whose weight was used without a call.
        used: names of the parameters that no mask, embedding or norm accounts for -> the operator, where it is inside a
            module recorded whole.
        own_gradient: whether something was met whose gradient its operators do not tell (an autograd function, a hook).
        left_out: what the model returned that a graph cannot hold.
        writes_parameters: whether the forward changed a parameter, or may have (through numpy).
        branches: values that the model read and the graph holds for alone, one phrase each.
        thread: the one that records; module calls of others pass by.
    """

    def __init__(
        self,
        root: nn.Module,
        opaque: frozenset[str],
        allow_data: bool,
        home: nn.Module | None = None,
        without_values: bool = False,
        look_inside: bool = False,
        pinned: bool = False,
    ):
        super().__init__()
        self.root, self.opaque, self.allow_data, self.pinned = root, opaque, allow_data, pinned
        self.home = root if home is None else home
        self.device = next((t.device for t in chain(self.home.parameters(), self.home.buffers())), None)
        self.without_values = without_values
        self.look_inside = look_inside and not root.training
        self.shapes_alone = without_values or (self.device is not None and self.device.type == "meta")
        self.thread = threading.get_ident()
        self.read: dict[str, None] = {}
        self.used: dict[str, str] = {}
        self.own_gradient = False
        self.left_out: list[str] = []
        self.branches: list[str] = []
        self.randomness: tuple[Any, ...] = ()
        self.generators = own_generators(root)
        self.writes_parameters = False
        self.memory_of_parameters = {p.untyped_storage()._cdata for p in root.parameters() if not is_sharded(p)}
        self.running: list[nn.Module] = []  # as `stack`, modules inside those recorded whole included
        self.graph = fx.Graph()
        self.called: dict[str, None] = {}
        self.stack: list[str] = []
        self.inside_leaf = 0
        self.failed_in = ""
        self.module_names = {id(m): name for name, m in root.named_modules() if name}
        self.tensor_names = {id(t): name for name, t in chain(root.named_buffers(), root.named_parameters())}
        self.plain_tensors: dict[int, str] | None = None
        # An id is only good as long as its tensor lives; tensors are not kept, so that the run needs no more memory
        # than any forward.
        self.nodes: dict[int, tuple[weakref.ref[Tensor], Callable[[], fx.Node]]] = {}
        # Objects among the inputs, kept alive so that their ids stay theirs.
        self.objects: dict[int, tuple[Any, Callable[[], fx.Node]]] = {}
        self.from_data: set[fx.Node] = set()
        self.data_sizes = DataSizes()
        self.parts = Parts()
        self.grad_switches: list[tuple[bool, fx.Node]] = []

    # -- values to nodes ------------------------------------------------------------------------------------------

    def placeholders(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make the graph's inputs; returns the arguments to run the model on."""
        names = [p for p in forward_parameters(self.root) if p not in kwargs]
        inputs = []
        for i, value in enumerate(args):
            node = self.graph.placeholder(names[i] if i < len(names) else f"input_{i}")
            inputs.append(self._input(value, node))
        named = {}
        for name, value in kwargs.items():
            named[name] = self._input(value, self.graph.placeholder(name))
        return tuple(inputs), named

    def _input(self, value: Any, node: fx.Node) -> Any:
        self.from_data.add(node)
        if isinstance(value, Tensor):
            # A fresh tensor object: an input that is also a buffer or another input must not share its node.
            value = value.view_as(value)
            node.meta.update(shape=tuple(value.shape), dtype=value.dtype)
        self._track(value, lambda: node)
        return value

    def _track(self, value: Any, node: Callable[[], fx.Node]) -> None:
        """Remember the node of every tensor in `value`; parts of a container get theirs when first used."""
        if isinstance(value, Tensor):
            self.nodes[id(value)] = weakref.ref(value), node
        elif isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                self._track(item, self._part(node, i, item))
        elif isinstance(value, dict):
            for key, item in value.items():
                self._track(item, self._part(node, key, item))
        elif hasattr(value, "__dict__") and not can_be_written(value) and not isinstance(value, nn.Module):
            if id(value) in self.objects:
                return
            self.objects[id(value)] = value, node
            for key, item in list(vars(value).items()):
                self._track(item, self._part(node, key, item, getattr))

    def _object_node(self, value: Any) -> fx.Node | None:
        found = self.objects.get(id(value))
        return found[1]() if found is not None and found[0] is value else None

    def _part(
        self, whole: Callable[[], fx.Node], key: Any, item: Any, take: Callable[..., Any] = operator.getitem
    ) -> Callable[[], fx.Node]:
        made: list[fx.Node] = []

        def make() -> fx.Node:
            if not made:
                made.append(self._emit("call_function", take, (whole(), key), {}, item))
                if whole() in self.from_data:
                    self.from_data.add(made[0])
            return made[0]

        return make

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that computed `tensor`, or the one that reads it from the model."""
        entry = self._entry(tensor)
        if entry is not None:
            if isinstance(tensor, nn.Parameter) and (name := self.tensor_names.get(id(tensor))) is not None:
                self._note_use(tensor, name)
            return entry()
        alias = self._same_memory(tensor)
        node = self._constant(tensor) if alias is None else alias()
        self._track(tensor, lambda: node)
        return node

    def _same_memory(self, tensor: Tensor) -> Callable[[], fx.Node] | None:
        """The node of a known tensor that is this one in another object (`torch.Tensor(t)`, an autograd function)."""
        if id(tensor) in self.tensor_names or tensor.layout is not torch.strided or tensor.numel() == 0:
            return None
        place = lambda t: (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype)  # noqa: E731
        with torch._C.DisableTorchFunction():
            wanted = place(tensor)
            for reference, node in self.nodes.values():
                known = reference()
                if known is not None and known.layout is torch.strided and place(known) == wanted:
                    return node
        return None

    def _entry(self, tensor: Tensor) -> Callable[[], fx.Node] | None:
        found = self.nodes.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def _constant(self, tensor: Tensor) -> fx.Node:
        """The `get_attr` node of a parameter, a buffer, or a tensor from outside the recording."""
        name = self.tensor_names.get(id(tensor))
        if name is not None:
            owner_name, _, leaf = name.rpartition(".")
            owner = self.root.get_submodule(owner_name)
            self._note_use(tensor, name)
            if isinstance(owner, MaskedLayer) and leaf == owner.weight_name:
                self.called.setdefault(owner_name)
                name = f"{owner_name}.effective_weight"
        else:
            if self.plain_tensors is None:
                self.plain_tensors = plain_tensor_names(self.root)
            name = self.plain_tensors.get(id(tensor))
        if name is None:
            if tensor.is_meta and self.without_values:
                raise NeedsValuesError("a tensor that no recorded operator computed")
            name = f"{RECORDED_CONSTANT}{sum(n.startswith(RECORDED_CONSTANT) for n in self.home._buffers)}"
            self.home.register_buffer(name, tensor.detach().clone(), persistent=False)
        node = self.graph.create_node("get_attr", name)
        node.meta.update(shape=tuple(tensor.shape), source=source_line(), module=self.stack[-1] if self.stack else "")
        return node

    def _note_use(self, tensor: Tensor, name: str, operator_name: str = "") -> None:
        """Remember that a parameter was used, and whether by another module than its own layer."""
        owner_name, _, leaf = name.rpartition(".")
        owner = self.root.get_submodule(owner_name)
        running = self.running[-1] if self.running else None
        # Attention reads its output projection, and gives it its mask.
        attends = isinstance(running, nn.MultiheadAttention) and isinstance(running, MaskedLayer)
        by_itself = running is owner or (
            attends and self.module_names.get(id(running)) == owner_name[: -len(".out_proj")]
        )
        if isinstance(owner, MaskedLayer) and leaf == owner.weight_name:
            if not by_itself:
                self.called.setdefault(owner_name)
                self.read.setdefault(owner_name)
        elif isinstance(tensor, nn.Parameter) and not (by_itself and isinstance(owner, (*_EMBEDDINGS, *_NORMS))):
            self.used.setdefault(name, operator_name)

    def note_uses_inside(self, operator_name: str, *nests: Any) -> None:
        """Remember the parameters that an operator inside a module recorded whole uses."""
        for value in pytree.tree_leaves(nests):
            if isinstance(value, nn.Parameter) and (name := self.tensor_names.get(id(value))) is not None:
                self._note_use(value, name, operator_name)

    def as_argument(self, value: Any, build: bool = False) -> Any:
        """`value` with nodes for its tensors and numbers. `build`: classes of containers become calls of them."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, (TracedInt, TracedFloat)):
            node = value.node_in(self)
            return plain(value) if node is None else node
        if isinstance(value, slice):
            return slice(*(self.as_argument(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, tuple):
            items = [self.as_argument(v, build) for v in value]
            return _named(type(value), items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, list):
            return [self.as_argument(v, build) for v in value]
        if build and dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {
                f.name: self.as_argument(getattr(value, f.name), build) for f in dataclasses.fields(value) if f.init
            }
            return self.graph.call_function(type(value), (), fields)
        if isinstance(value, dict):
            items_of = {k: self.as_argument(v, build) for k, v in value.items()}
            if build and type(value) is not dict:
                return self.graph.call_function(type(value), (list(items_of.items()),))
            return items_of
        if isinstance(value, torch.device) and value.type == "meta" and self.device is not None:
            return self.device
        if isinstance(value, np.generic):  # its text is not valid Python
            return value.item()
        if not can_be_written(value) and build:
            self.left_out.append(type(value).__name__)
            return None
        if not can_be_written(value) and (node := self._object_node(value)) is not None:
            return node
        if not can_be_written(value):
            self._refuse_data(-1, f"a `{type(value).__name__}`, which a graph cannot hold, is passed on")
            return None
        return value

    def _emit(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> fx.Node:
        node = self.graph.create_node(op, target, self.as_argument(args), self.as_argument(kwargs))
        facts = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (None, None)
        module = self.stack[-1] if self.stack else ""
        node.meta.update(source=source_line(), module=module, shape=facts[0], dtype=facts[1])
        if any(n in self.from_data for n in node.all_input_nodes):
            self.from_data.add(node)
        return node

    def emit_number(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
        """The node of a computed size (see `numbers`)."""
        node = self.graph.create_node("call_function", function, self.as_argument(args))
        node.meta.update(shape=None, source=source_line(), module=self.stack[-1] if self.stack else "", number=True)
        return node

    def _size(self, tensor: Tensor, dim: int) -> Callable[[], fx.Node]:
        # A number outlives its tensor, which must not be seen as one that shares memory for it.
        of_tensor = self._entry(tensor) or functools.partial(self.node_of, tensor)

        def make() -> fx.Node:
            node = self.graph.create_node("call_method", "size", (of_tensor(), dim))
            node.meta.update(shape=None, source="", module=self.stack[-1] if self.stack else "", number=True)
            return node

        return make

    def traced_shape(self, tensor: Tensor) -> torch.Size:
        """The shape of `tensor` in numbers that remember it."""
        by_data = self._is_sized_by_data(tensor)
        sizes = [traced(int(n), self, self._size(tensor, i), by_data) for i, n in enumerate(tensor.shape)]
        return torch.Size(sizes)

    def decide(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Python is about to branch on ``function(*args)`` of sizes that depend on data."""
        what = "a branch on a size that depends on values of the input"
        if self._pins():
            self._pin(self.emit_number(function, args), function(*map(plain, args)), what)
        else:
            self._refuse_data(-1, what)

    def _pins(self) -> bool:
        """Whether a value read now is taken as a constant; inside a submodule, that is recorded whole instead."""
        return self.pinned and not self.stack

    def _pin(self, node: fx.Node, value: Any, what: str) -> None:
        """Let the graph check that it reads what the recording saw."""
        self._emit("call_function", graph_ops.require_value, (node, value, f"{what}, at {source_line()}"), {}, None)
        self.branches.append(f"{what} gives {value!r}, at {source_line()}")

    def check_randomness(self, *, allowed: bool = False) -> None:
        """Stop in the module that is running where Python's or numpy's generator drew since the last check."""
        before, self.randomness = self.randomness, python_randomness(self.generators)
        if not allowed and self.randomness != before:
            self._refuse_data(-1, "random numbers of Python or numpy, which a graph does not draw")

    def _refuse_data(self, level: int, what: str) -> None:
        """Stop in the module that is running (-1), or in the one that called it (-2)."""
        if not self.allow_data:
            module = self.stack[level] if len(self.stack) >= -level else ""
            raise DataDependentError(module, f"{what}, at {source_line()}")

    def _is_sized_by_data(self, tensor: Tensor) -> bool:
        return tensor in self.data_sizes

    # -- what happens in the run ------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain_args, plain_kwargs = plain_arguments(args), plain_arguments(kwargs)
        if self.without_values and self.device is not None:
            plain_args, plain_kwargs = self._where_it_runs(plain_args), self._where_it_runs(plain_kwargs)
        if torch._C._are_functorch_transforms_active() and not self.inside_leaf:
            self._refuse_data(-1, "a transform of `torch.func`, inside of which values are not the model's")
            raise RuntimeError("values inside a transform of `torch.func` cannot be followed")
        name = getattr(func, "__name__", "")
        if changes_in_place(name) or name in _WRITES or "out" in kwargs:
            self._note_write(args, kwargs)
        if self.inside_leaf:
            if name != "__get__":
                self.note_uses_inside(name, args, kwargs)
            value = function_shapes(func, plain_args) if self.shapes_alone else None
            return func(*plain_args, **plain_kwargs) if value is None else value
        if name in _GRADIENT_HOOKS:
            self.own_gradient = True
            return RemovableHandle(OrderedDict())  # nothing has a gradient while it is recorded
        if name == "__get__":
            return self._attribute(func.__self__.__name__, func, args)
        if name == "_set_grad_enabled":
            return self._grad_switch(bool(plain_args[0]))
        if name in _DATA_TO_PYTHON:
            return self._to_python(name, func, plain_args, plain_kwargs)
        if name == "__setitem__":
            return self._set_item(*args)
        if name in ("__iter__", "__len__") and self._is_sized_by_data(args[0]):
            self.decide(operator.pos, (self.traced_shape(args[0])[0],))
        if name == "__iter__":
            return iter(self.__torch_function__(Tensor.unbind, (), (args[0], 0)))
        if changes_in_place(name) and isinstance(args[0], Tensor) and self._rewritable(args[0]):
            return self._write_part(func, name, args, kwargs)
        # Arguments are looked up before the call: one that is changed in place keeps the node it had.
        op, target = operation(func, name)
        node_args, node_kwargs = self.as_argument(tuple(args)), self.as_argument(kwargs)
        value = function_shapes(func, plain_args) if self.shapes_alone else None
        if value is None:
            value = func(*plain_args, **plain_kwargs)
        if name in _NO_VALUE:
            return value
        if name == "size" or name == "numel":
            return self._number_result(name, args, kwargs, value)
        if not holds_tensor(value):
            return value
        node = self._emit(op, target, node_args, node_kwargs, value)
        if name in _RANDOM:  # what Python decides by it is decided anew in every call
            self.from_data.add(node)
        self._track(value, lambda: node)
        self.data_sizes.note(name, (args, kwargs), value, node in self.from_data)
        if isinstance(value, Tensor) and value._is_view():
            self.parts.note(name, args, value)
        return value

    def _note_write(self, args: Any, kwargs: Any) -> None:
        for value in pytree.tree_leaves((args[:1], kwargs.get("out"))):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                self.writes_parameters |= value.untyped_storage()._cdata in self.memory_of_parameters

    def _where_it_runs(self, arguments: Any) -> Any:
        """The arguments with the device of this run in place of the model's."""
        if isinstance(arguments, dict):
            return {
                k: torch.device("meta") if (k == "device" and v is not None and self._is_home(v)) else v
                for k, v in arguments.items()
            }
        return tuple(torch.device("meta") if isinstance(v, torch.device) and self._is_home(v) else v for v in arguments)

    def _is_home(self, device: Any) -> bool:
        assert self.device is not None
        return isinstance(device, (str, int, torch.device)) and torch.device(device).type == self.device.type

    def _attribute(self, name: str, getter: Any, args: tuple[Any, ...]) -> Any:
        tensor = args[0]
        if name in ("requires_grad", "grad_fn"):
            self.own_gradient = True  # a branch by it may change the gradient
        if name == "shape":
            return self.traced_shape(tensor) if self._entry(tensor) else tensor.shape
        if tensor.is_meta and self.without_values and self.device is not None:
            # The model runs where its parameters are, and may branch on it.
            if name == "device":
                return self.device
            if name in _ON_DEVICE:
                return _ON_DEVICE[name] == self.device.type
        value = getter(*args)
        if isinstance(value, Tensor) and value is not tensor and name != "grad":
            node = self._emit("call_function", getattr, (tensor, name), {}, value)
            self._track(value, lambda: node)
        return value

    def _number_result(self, name: str, args: Any, kwargs: Any, value: Any) -> Any:
        tensor = args[0]
        of_tensor = self._entry(tensor)
        if of_tensor is None:
            return value
        if name == "numel":
            make = lambda: self._emit("call_method", "numel", (of_tensor(),), {}, None)  # noqa: E731
            return traced(value, self, make, self._is_sized_by_data(tensor))
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return self.traced_shape(tensor) if dim is None else self.traced_shape(tensor)[int(dim)]

    def _grad_switch(self, enabled: bool) -> None:
        """`with no_grad()` becomes a pair of nodes, the second of which restores what the first one found."""
        before = torch.is_grad_enabled()
        if self.grad_switches and self.grad_switches[-1][0] == enabled:
            _, entry = self.grad_switches.pop()
            node = self.graph.create_node("call_function", torch._C._set_grad_enabled, (entry,))
        elif before != enabled:
            node = self.graph.create_node("call_function", graph_ops.swap_grad_enabled, (enabled,))
            self.grad_switches.append((before, node))
        else:
            return
        node.meta.update(shape=None, source=source_line(), module=self.stack[-1] if self.stack else "")
        torch._C._set_grad_enabled(enabled)

    def _to_python(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [a for a in chain(args, kwargs.values()) if isinstance(a, Tensor)]
        read = [self.node_of(t) for t in tensors if self._entry(t)]
        if not any(node in self.from_data for node in read):
            return func(*args, **kwargs)
        from_input = any(map(has_input, read))
        what = f"`{name.strip('_')}` of {'a tensor computed from the input' if from_input else 'a random number'}"
        if not (self._pins() and from_input) or name in _ARRAYS:
            self._refuse_data(-1, what)
            return func(*args, **kwargs)
        node_args, node_kwargs = self.as_argument(args), self.as_argument(kwargs)
        value = func(*args, **kwargs)
        self._pin(self._emit(*operation(func, name), node_args, node_kwargs, None), value, what)
        return value

    def _set_item(self, base: Tensor, index: Any, value: Any) -> None:
        args = (base, index, value)
        # Looked up before the write, as any argument.
        node_args = self.as_argument(args)
        # `base[i] += x` ends in storing the part that was changed.
        functional = self._rewritable(base, value) if base._is_view() else self._owned(base, [base, value])
        base[plain_arguments(index)] = plain_arguments(value)
        if not functional:
            self._emit("call_function", operator.setitem, node_args, {}, None)
            return
        node = self._emit("call_function", graph_ops.set_item, node_args, {}, base)
        self._track(base, lambda: node)
        self._write_back(base)

    def _write_part(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """An in-place operator on a part of a tensor, in functional form: the whole gets a new node."""
        part = args[0]
        rest, named = self.as_argument(tuple(args[1:])), self.as_argument(kwargs)
        copied = self._emit("call_method", "clone", (part,), {}, part)
        copied.meta["for_write"] = True
        value = func(*plain_arguments(args), **plain_arguments(kwargs))
        node = self._emit("call_method", name, (copied, *rest), named, value)
        self._track(part, lambda: node)
        self._write_back(part)
        return value

    def _rewritable(self, part: Tensor, *written: Any) -> bool:
        """Whether all that sees a write into `part` is the chain it was taken from, and what is `written`."""
        seen = self.parts.chain(part)
        return len(seen) > 1 and self._owned(seen[-1], [*seen, *written], part)

    def _owned(self, whole: Tensor, known: list[Any], part: Tensor | None = None) -> bool:
        """Whether `whole` was computed in this run and nothing but the `known` tensors shares its memory.

        Given a `part`, the memory of that part.
        """
        if whole._is_view() or self.node_of(whole).op in ("get_attr", "placeholder"):
            return False
        others = (reference() for reference, _ in self.nodes.values())
        sharing = [t for t in others if t is not None and t._base is whole and all(t is not k for k in known)]
        return all(part is not None and are_apart(t, part) for t in sharing)

    def _write_back(self, part: Tensor) -> None:
        while (link := self.parts.whole_of(part)) is not None:
            whole, index = link
            if index is None:
                node = self._emit("call_method", "reshape_as", (part, whole), {}, whole)
            elif isinstance(index, MovedAxes):
                node = self._emit("call_method", index.method, (part, *index.args), {}, whole)
            else:
                node = self._emit("call_function", graph_ops.set_item, (whole, index, part), {}, whole)
            node.meta["carried_back"] = True
            self._track(whole, lambda node=node: node)
            part = whole

    def call_leaf(self, original: Callable[..., Any], module: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
        """A module recorded as one node. Raises `HookChangesValuesError` where one node would not say what it does."""
        if not all_can_be_written((args, kwargs)):
            # Then the module that called it is what a graph can hold.
            self._refuse_data(-2, f"`{name}` takes an object that a graph cannot hold")

        hooked = has_forward_hooks(module)

        def run(*args: Any, **kwargs: Any) -> Any:
            if hooked and name not in self.opaque:
                return without_changes(original, module, args, kwargs)
            value = module_shapes(module, args) if self.shapes_alone and not kwargs else None
            return original(module, *args, **kwargs) if value is None else value

        return self.as_one_node("call_module", name, run, args, kwargs)

    def as_one_node(self, op: str, target: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run something without looking inside."""
        level = -2 if op == "call_module" else -1
        try:
            node_args, node_kwargs = self.as_argument(tuple(args)), self.as_argument(kwargs)
        except _UnheldError as problem:
            self._refuse_data(level, f"`{target}` takes {problem}")
            raise
        given = plain_arguments(tuple(args)), plain_arguments(kwargs)
        before = contents(given)
        self.inside_leaf += 1
        try:
            value = run(*given[0], **given[1])
        finally:
            self.inside_leaf -= 1
        if contents(given) != before:  # which no node says; where the module that called it is whole, nobody need know
            self._refuse_data(level, f"`{target}` writes into a list or dict that it is given")
        node = self._emit(op, target, node_args, node_kwargs, value)
        self._track(value, lambda: node)
        self.data_sizes.note(str(target), (args, kwargs), value, node in self.from_data)
        return value

    def is_leaf(self, module: nn.Module, name: str) -> bool:
        """Whether a call of `module` is one node."""
        return name in self.opaque or is_one_operator(module)


class _UnheldError(TypeError):
    """A container that cannot be made of nodes."""


def _named(kind: type, items: list[Any]) -> Any:
    """A named tuple of nodes."""
    try:
        return kind(*items)
    except Exception as problem:
        raise _UnheldError(f"a `{kind.__name__}`, which computes with what it holds ({problem})") from problem
