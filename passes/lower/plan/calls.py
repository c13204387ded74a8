"""Record what torch computes when a network runs, operator by operator, for any batch size.

The network runs twice, with batches of 2 and 3, and every ATen operator is noted. Both runs call the same operators in
the same order; a number that differs between them grows with the batch. Tensors that are computed from parameters
alone, and are the same in both, are constants. Of what is computed from the inputs only shapes are wanted, so that most
operators are not run but asked for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from growfx.errors import TraceError, one_line
from growfx.passes.operators.nests import Leaf, map_leaves
from growfx.passes.record.recording import working_copy
from growfx.quiet import ignored_warnings
from growfx.recorded.inputs import Inputs
from growfx.runtime.native.plan import Shape, Size

__all__ = ["Call", "Calls", "Reference", "record_calls", "record_operators"]

_BATCHES = (2, 3)
_TORCH: Any = torch  # parts of it are not declared
_LARGER = 5  # a further batch size, to check what was found at these


class Reference(Leaf):
    """A tensor in the arguments of a call, by its number in the order in which they appeared."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and self.number == other.number

    def __hash__(self) -> int:
        return hash(self.number)

    def __repr__(self) -> str:
        return f"%{self.number}"


@dataclass(frozen=True)
class Call:
    """One operator.

    Attributes:
        operator: its name, as in `aten.add`.
        arguments: by name, defaults included, with a `Reference` in the place of a tensor and a `Size` in that of a
            number that grows with the batch.
        results: numbers of the tensors that it returns; None for what is not a tensor.
        function: the overload of torch that was called.
    """

    operator: str
    arguments: dict[str, Any]
    results: tuple[int | None, ...]
    function: Any = None


@dataclass
class Calls:
    """A network as operators.

    Attributes:
        calls: in order; those that only compute constants are left out.
        makers: number of a constant that is computed -> the call that does.
        shapes: by tensor number.
        dtypes: by tensor number.
        constants: tensor number -> its value.
        inputs, outputs: tensor numbers.
        form: what the network returns, as a tree and its leaves: a `Reference` for a tensor, a `Size` for a number that
            grows with the batch, or a plain value; None where only the tensors are wanted.
    """

    calls: list[Call]
    makers: dict[int, Call]
    shapes: dict[int, Shape]
    dtypes: dict[int, torch.dtype]
    constants: dict[int, Tensor]
    inputs: list[int]
    outputs: list[int]
    form: tuple[pytree.TreeSpec, tuple[Any, ...]] | None = None


class _Recorder(TorchDispatchMode):
    """Notes operators while a network runs.

    Args:
        stored: parameters and buffers, by name.
        values: compute what depends on the inputs, which otherwise has shapes alone.

    Raises:
        TraceError: while it runs: an operator reads a number from data, or writes where a plan does not.
    """

    def __init__(self, stored: Mapping[str, Tensor], values: bool) -> None:
        super().__init__()
        self.values = values
        # Memory that is there before and after a run -> what it is of.
        self.lasting: dict[int, str] = {}
        # All tensors are kept alive, for ids of dead ones are given again.
        self.tensors: list[Tensor] = []
        self.numbers: dict[int, int] = {}
        self.computed: set[int] = set()
        self.calls: list[tuple[Any, Any, Any, tuple[int | None, ...]]] = []
        for name, tensor in stored.items():
            self.number_of(tensor)
            self.lasting[_memory_of(tensor)] = f"`{name}`"

    def number_of(self, tensor: Tensor) -> int:
        number = self.numbers.get(id(tensor))
        return self._add(tensor) if number is None else number

    def add_input(self, tensor: Tensor, name: str) -> int:
        number = self._add(tensor)
        self.computed.add(number)
        self.lasting[_memory_of(tensor)] = name
        return number

    def _add(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        self.numbers[id(tensor)] = len(self.tensors) - 1
        return len(self.tensors) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if func._schema.is_mutable:
            self._refuse_lasting_writes(func, *given)
        noted = map_leaves(self._noted, given)
        depends = any(isinstance(x, Reference) and x.number in self.computed for x in pytree.tree_leaves(noted))
        if depends and (func in _READS_VALUES or torch.Tag.data_dependent_output in func.tags):
            raise TraceError(
                "the network reads a number from data that it computes (`.item()`, or a branch on it), so it has no "
                "steps that hold for all inputs"
            )
        result = _shaped(func, args, kwargs or {}) if depends and not self.values else func(*args, **(kwargs or {}))
        listed = result if isinstance(result, (tuple, list)) else (result,)
        results = tuple(self._add(x) if isinstance(x, Tensor) else None for x in listed)
        if depends:
            self.computed.update(number for number in results if number is not None)
        self.calls.append((func, *noted, results))
        if depends and func._schema.is_mutable and func is not torch.ops.aten.as_strided_.default:
            self._check_write(func, args[0])
        return result

    def _refuse_lasting_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """A plan reads inputs and parameters, and leaves them as they are."""
        given = _by_name(func, args, kwargs)
        written = [given[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for tensor in pytree.tree_leaves(written):
            if isinstance(tensor, Tensor) and (name := self.lasting.get(_memory_of(tensor))) is not None:
                raise TraceError(f"the network writes into {name}, which a native run leaves as it is")

    def _check_write(self, func: Any, written: Any) -> None:
        """Operators inside torch's own may write into a tensor that they have just made, of which there is no view."""
        if written.is_meta:  # it has no memory to tell views by
            return
        pointer = written.untyped_storage().data_ptr()
        alive = {id(x) for x in self.tensors if x.numel() and x.untyped_storage().data_ptr() == pointer}
        if alive != {id(written)}:
            raise TraceError(f"`{func}` writes into a tensor that has views, which the native runtime cannot follow")

    def _noted(self, value: Any) -> Any:
        return Reference(self.number_of(value)) if isinstance(value, Tensor) else value


class _Unreadable(TorchFunctionMode):
    """Nobody reads a tensor past torch, where there are no numbers while a network is recorded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS_MEMORY and _TORCH._is_functional_tensor(args[0]):
            raise TraceError(
                f"the network reads the numbers of a tensor past torch (`{func.__name__}`), so it has no steps that "
                "hold for all inputs"
            )
        return func(*args, **(kwargs or {}))


_READS_MEMORY = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.tolist, Tensor.data_ptr)


def _memory_of(tensor: Tensor) -> int:
    """The same number for a tensor and its views, on the meta device as well."""
    return tensor.untyped_storage()._cdata


def _shaped(func: Any, args: Any, kwargs: Any) -> Any:
    """Tensors like those that an operator gives, without their numbers where it can tell shapes without them."""
    if func.is_view or func._schema.is_mutable:
        return func(*args, **kwargs)
    try:
        made = func(*pytree.tree_map_only(Tensor, _on_meta, args), **pytree.tree_map_only(Tensor, _on_meta, kwargs))
    except Exception:  # it needs the numbers, or has no such form
        return func(*args, **kwargs)
    return pytree.tree_map_only(Tensor, _off_meta, made)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _off_meta(tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return made if made.is_floating_point() else made.zero_()  # places that exist, where numbers are indices


_READS_VALUES = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
)


def record_calls(model: nn.Module, inputs: Inputs, *, only_floats: bool = True) -> Calls:
    """The operators of a model in evaluation mode.

    Args:
        model: with values, on the CPU, in float32.
        inputs: example inputs whose tensors have the batch as their first axis.
        only_floats: all of them must be positional float tensors, as the native runtime alone takes them; else there
            may be tensors of other types, keyword arguments, and plain values, which become part of what is recorded.

    Raises:
        TraceError: the operators depend on the data, or on the batch in a way that no formula tells; or the network
            writes into its inputs, parameters or buffers.
    """
    given = [x for x in inputs.args if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0]
    if only_floats and (len(given) != len(inputs.args) or inputs.kwargs or not given):
        raise TraceError("the native runtime takes float tensors as positional arguments; the network takes others")
    with ignored_warnings():
        try:
            single, *runs, larger = _runs(model, inputs, values=False)
        except TraceError:
            raise
        except Exception:  # an operator that refuses numbers that are not there
            single, *runs, larger = _runs_with_values(model, inputs)
    calls = _unified(*runs)
    _check_at(_LARGER, calls, runs[0], larger)
    outputs = [single.shapes[number] for number in single.outputs]
    if outputs != [_shape_at(calls.shapes[number], 1) for number in calls.outputs]:
        raise TraceError(f"{_NO_FORMULA}: at a batch of 1 the outputs have other axes, {outputs}")
    if not only_floats:
        calls.form = _form(dict(zip((1, *_BATCHES, _LARGER), (single, *runs, larger), strict=True)))
    return calls


def record_operators(model: nn.Module, inputs: Inputs) -> list[str]:
    """The names of the operators that depend on the inputs, in order, of a single run.

    The model and its inputs may be on the meta device, where nothing is computed.

    Raises:
        TraceError: the operators depend on the data.
    """
    with ignored_warnings():
        run = _run(model, inputs, values=True)
    return [_name_of(func) for func, _, _, results in run.calls if any(number in run.computed for number in results)]


_NO_FORMULA = "the network depends on the batch size in no simple way, so it has no plan for all of them"


def _shape_at(shape: Shape, batch: int) -> tuple[int, ...]:
    """The sizes of a shape at a batch size."""
    return tuple(size.per_batch * batch + size.fixed for size in shape)


def _check_at(batch: int, calls: Calls, first: _Run, run: _Run) -> None:
    """Hold shapes, arguments and constants, of which two batch sizes told a formula, to a run at a third.

    Half of the batch, rounded, is one row at two and at three.
    """
    if not _alike(first, run) or len(calls.shapes) != len(run.shapes):
        raise TraceError(f"{_NO_FORMULA}: at a batch of {batch} it calls other operators")
    for number, shape in calls.shapes.items():
        if _shape_at(shape, batch) != run.shapes[number]:
            raise TraceError(f"{_NO_FORMULA}: at a batch of {batch} a tensor has shape {run.shapes[number]}")
    for number, value in calls.constants.items():
        if not _equal(value, run.constants.get(number)):
            raise TraceError(f"{_NO_FORMULA}: at a batch of {batch} a constant of it is another one")
    found = {results: (func, args, kwargs) for func, args, kwargs, results in run.calls}
    for call in calls.calls:
        func, args, kwargs = found[call.results]
        if not _agree(call.arguments, _by_name(func, args, kwargs), batch):
            raise TraceError(f"{_NO_FORMULA}: at a batch of {batch} `{call.operator}` gets other numbers")


def _alike(first: _Run, second: _Run) -> bool:
    """Whether two runs call the same operators."""
    same = len(first.calls) == len(second.calls) and all(
        a[0] is b[0] and a[3] == b[3] for a, b in zip(first.calls, second.calls, strict=True)
    )
    return same and first.outputs == second.outputs


def _agree(planned: Any, found: Any, batch: int) -> bool:
    if isinstance(planned, Size):
        return planned.per_batch * batch + planned.fixed == found
    if isinstance(planned, dict):
        return all(_agree(value, found[key], batch) for key, value in planned.items())
    if isinstance(planned, (tuple, list)):
        return len(planned) == len(found) and all(_agree(x, y, batch) for x, y in zip(planned, found, strict=True))
    return planned == found or (planned != planned and found != found)


@dataclass
class _Run:
    calls: list[tuple[Any, Any, Any, tuple[int | None, ...]]]
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    constants: dict[int, Tensor]
    computed: set[int]
    inputs: list[int]
    outputs: list[int]
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]


def _runs(model: nn.Module, inputs: Inputs, values: bool) -> list[_Run]:
    """Runs at batch sizes of 1, `_BATCHES` and `_LARGER`."""
    model = working_copy(model)
    # What a model keeps from its first call, such as a table of positions, is there when it is recorded.
    return [_run(model, inputs.with_batch(batch), values) for batch in (1, *_BATCHES, _LARGER)]


def _runs_with_values(model: nn.Module, inputs: Inputs) -> list[_Run]:
    try:
        return _runs(model, inputs, values=True)
    except TraceError:
        raise
    except Exception as error:
        if "mutating a non-functional tensor" in str(error):
            raise TraceError("the network writes into a parameter, a buffer or an attribute of its own") from error
        raise TraceError(
            f"the network fails on its example inputs, or on such with another number of rows ({one_line(error)})"
        ) from error


def _run(model: nn.Module, inputs: Inputs, values: bool) -> _Run:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    recorder = _Recorder({**dict(model.named_parameters()), **dict(model.named_buffers())}, values)
    numbers, specs = list[int](), list[pytree.TreeSpec]()

    def forward(*tensors: Tensor) -> Any:
        waiting = iter(tensors)
        values = [next(waiting) if isinstance(x, Tensor) else x for x in inputs.values]
        args, named = values[: len(inputs.args)], values[len(inputs.args) :]
        leaves, spec = pytree.tree_flatten(model(*args, **dict(zip(inputs.kwargs, named, strict=True))))
        specs.append(spec)
        return leaves

    # In functional form nothing is written in place, so a value never changes.
    functional: Callable[..., Any] = torch.func.functionalize(forward)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            # Contiguous, as what the runtime is given, so that `x.contiguous().relu_()` is seen to write into `x`.
            named = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in _named(inputs)}
            args = list(named.values())
            numbers = [recorder.add_input(x, name) for name, x in named.items()]
            with recorder, _Unreadable():
                outputs = functional(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    tensors = [x for x in outputs if isinstance(x, Tensor)]
    if not tensors:
        raise TraceError("the network returns no tensors")
    outs = [recorder.number_of(x) for x in tensors]  # some that no operator reads among them
    constants = {i: x for i, x in enumerate(recorder.tensors) if i not in recorder.computed}
    leaves = tuple(Reference(recorder.number_of(x)) if isinstance(x, Tensor) else x for x in outputs)
    shapes, dtypes = [tuple(x.shape) for x in recorder.tensors], [x.dtype for x in recorder.tensors]
    return _Run(recorder.calls, shapes, dtypes, constants, recorder.computed, numbers, outs, specs[0], leaves)


def _named(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments, in order, with words for which argument each is."""
    for place, value in enumerate(inputs.args):
        if isinstance(value, Tensor):
            yield f"its argument {place + 1}", value
    for name, value in inputs.kwargs.items():
        if isinstance(value, Tensor):
            yield f"its argument `{name}`", value


def _unified(first: _Run, second: _Run) -> Calls:
    if not _alike(first, second):
        raise TraceError("the network calls other operators at another batch size, so it has no plan for all of them")
    shapes = {
        i: tuple(_size(a, b) for a, b in zip(one, two, strict=True))
        for i, (one, two) in enumerate(zip(first.shapes, second.shapes, strict=True))
    }
    constants = {i: x for i, x in first.constants.items() if _equal(x, second.constants.get(i))}
    calls, makers = list[Call](), dict[int, Call]()
    for (func, args, kwargs, results), (_, args_2, kwargs_2, _) in zip(first.calls, second.calls, strict=True):
        is_constant = all(number is None or number in constants for number in results)
        name = _name_of(func)
        try:
            call = Call(name, _by_name(func, *_merged((args, kwargs), (args_2, kwargs_2))), results, func)
        except ValueError as error:
            if is_constant:
                continue
            raise TraceError(f"`{name}` gets {error}, which grows with the batch in no simple way") from error
        if is_constant:
            makers |= {number: call for number in results if number is not None}
        else:
            calls.append(call)
    dtypes = dict(enumerate(first.dtypes))
    return Calls(calls, makers, shapes, dtypes, constants, first.inputs, first.outputs)


def _name_of(func: Any) -> str:
    name = f"{func.namespace}.{func.overloadpacket.__name__}"
    return name.removesuffix("_") if func._schema.is_mutable and name != "aten.as_strided_" else name


def _form(runs: Mapping[int, _Run]) -> tuple[pytree.TreeSpec, tuple[Any, ...]]:
    """What the runs, by their batch size, return."""
    first, second = (runs[batch] for batch in _BATCHES)
    if any(run.spec != first.spec for run in runs.values()):
        raise TraceError(f"{_NO_FORMULA}: it returns values in another form at another batch size")
    strange = {type(x).__name__ for x in first.leaves if not isinstance(x, _PLAIN)}
    if strange:
        raise TraceError(f"the network returns objects that cannot be looked into: {', '.join(sorted(strange))}")
    try:
        leaves = _merged(first.leaves, second.leaves)
    except ValueError as error:
        raise TraceError(f"{_NO_FORMULA}: it returns {error}") from error
    for batch, run in runs.items():
        if not _agree(_unnumbered(leaves), _unnumbered(run.leaves), batch):
            raise TraceError(f"{_NO_FORMULA}: at a batch of {batch} it returns other values")
    return first.spec, leaves


def _unnumbered(leaves: tuple[Any, ...]) -> list[Any]:
    """Without the numbers of tensors: one row may be computed by other operators."""
    return [None if isinstance(leaf, Reference) else leaf for leaf in leaves]


_PLAIN = (Reference, bool, int, float, str, type(None))


def _by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    given = {
        argument.name: args[i] if i < len(args) else argument.default_value
        for i, argument in enumerate(func._schema.arguments)
    }
    return given | kwargs


def _equal(a: Tensor, b: Tensor | None) -> bool:
    if b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a is b or a.data_ptr() == b.data_ptr() or bool(torch.equal(a, b)) or bool(((a == b) | (a != a)).all())


def _merged(a: Any, b: Any) -> Any:
    """Nests of the same form, with a `Size` wherever the numbers differ."""
    if isinstance(a, (tuple, list)):
        if len(a) != len(b):
            raise ValueError(f"{len(a)} and {len(b)} arguments")
        items = [_merged(x, y) for x, y in zip(a, b, strict=True)]
        return tuple(items) if isinstance(a, tuple) else items
    if isinstance(a, dict):
        return {key: _merged(value, b[key]) for key, value in a.items()}
    if isinstance(a, int) and not isinstance(a, bool) and isinstance(b, int) and a != b:
        return _size(a, b)
    if isinstance(a, float) and a == a and a != b:
        raise ValueError(f"{a} and {b}")
    return a


def _size(a: int, b: int) -> Size:
    grows = (b - a) // (_BATCHES[1] - _BATCHES[0])
    if grows < 0:
        raise TraceError("a size becomes smaller with a larger batch, so the network has no plan for all of them")
    return Size(grows, a - grows * _BATCHES[0])
