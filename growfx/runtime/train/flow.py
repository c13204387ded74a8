"""Keep activations with the batch innermost from layer to layer, under the model's own forward.

While a network runs in such a flow, its sparse convolutions leave their outputs as they are laid out in memory, batch
norms are computed there, with the sum and the rectification that follow them, and what needs another layout (pooling,
dense convolutions, views) gets it. Linear layers leave theirs, all rows of a feature one after another, where only
pointwise functions lie between them and further linear layers. Tensors keep their shapes and values; only their
strides differ.
"""

from __future__ import annotations

import operator
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from growfx.errors import TraceError
from growfx.runtime.train.chains import ADDITIONS, RECTIFICATIONS, Chain
from growfx.runtime.train.rows import InnerRows

__all__ = ["Flow", "hand_over", "is_flowing", "is_inner", "note_dense", "note_rows", "rows_may_stay"]

_LOCAL = threading.local()

_CONCATENATIONS: set[Any] = {torch.cat, torch.concat, torch.concatenate}
_CHUNKS: set[Any] = {torch.chunk, torch.Tensor.chunk}
_SPLITS: set[Any] = {torch.split, torch.Tensor.split, *_CHUNKS}
# What gives a tensor the memory of another that lies as torch lays it out.
_VIEWS: set[Any] = {
    *(torch.Tensor.view, torch.Tensor.contiguous, torch.Tensor.flatten, torch.Tensor.reshape),
    *(torch.Tensor.view_as, torch.Tensor.reshape_as, torch.Tensor.ravel, torch.flatten, torch.reshape, torch.ravel),
}
# What torch computes slowly, or not at all, on tensors whose batch is innermost.
_OUTER: set[Any] = {
    *(torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.interpolate, F.pad, *_CONCATENATIONS, F.pixel_shuffle),
    *(F.group_norm, F.layer_norm, F.instance_norm, F.unfold, F.linear, torch.matmul, F.channel_shuffle),
    *_VIEWS,
    *(F.scaled_dot_product_attention, torch.Tensor.__matmul__, torch.bmm),
}
_IN_PLACE: set[Any] = {torch.relu_, torch.Tensor.relu_, torch.Tensor.add_, torch.Tensor.__iadd__, operator.iadd}
_MOST_TAPS = 255  # that a byte can tell apart
_MAX_POOLS: set[Any] = {F.max_pool2d, torch.max_pool2d}
_LAYOUTS: set[Any] = {torch.Tensor.stride, torch.Tensor.is_contiguous}
# What a tensor tells without its values.
_SHAPES: set[Any] = {
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.numel, torch.Tensor.nelement),
    *(*_LAYOUTS, torch.Tensor.is_floating_point, torch.Tensor.__len__),
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda")),
}


def is_inner(x: Tensor) -> bool:
    """Whether a tensor (N, C, ...) of images lies with its batch innermost."""
    return x.dim() > 2 and x.stride(0) == 1 and x.shape[0] > 1 and x.stride(-1) == x.shape[0]


def is_flowing() -> bool:
    """Whether this thread runs a network whose images flow with the batch innermost."""
    flow = _flow()
    return flow is not None and flow.images


def rows_may_stay() -> bool:
    """Whether this thread runs a network in a flow, so that linear layers may leave their outputs as they lie."""
    return _flow() is not None


def note_rows(out: Tensor) -> None:
    """Remember an output of a linear layer whose rows stay innermost, where `rows_may_stay`."""
    flow = _flow()
    assert flow is not None
    flow.rows.add(out)


def hand_over(x: Tensor) -> None:
    """Give a tensor that a layer of images is about to read outside of the flow's sight its values."""
    flow: Flow | None = getattr(_LOCAL, "flow", None)
    if flow is None:
        return
    if flow.rows:
        flow.rows.before(hand_over, (x,), {})
    flow._fill(x)


def note_dense() -> None:
    """Remember that the convolution which comes next is of a layer whose time with its turns is known."""
    flow = _flow()
    if flow is not None:
        flow.turn_is_known = True


def _flow() -> Flow | None:
    """The flow of this thread.

    None where saved tensors are taken by hooks: a checkpointed part of a model is computed again outside of the flow,
    and has to save the same then.
    """
    flow: Flow | None = getattr(_LOCAL, "flow", None)
    if flow is None:
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
    return flow if hooks(True) is None else None


@dataclass
class _Waiting:
    """A norm, or the sum of one, whose tensor the model has already and whose values wait for what is done with it.

    `tensor`: what the model holds: without values, or gone. `result`: the values after the rectification that should
    follow, where they were computed, and no rectification has taken them. `compute`: the values, with or without it.
    `reads`: tensors that `compute` reads. `gradient`: whether gradients were wanted. `moved`: whether running
    statistics have moved, as they do whatever becomes of the values.
    """

    tensor: weakref.ref[Tensor]
    compute: Callable[..., Tensor]
    chain: Chain
    result: Tensor | None
    reads: tuple[Tensor, ...]
    gradient: bool
    moved: list[bool]
    followed: bool = False


class Flow(TorchFunctionMode):
    """One call of a network in the flow.

    Args:
        chains: what follows each norm, by the id of its weight. What a call does otherwise gets the norm's own values.
        images: whether images keep their batch innermost; else linear layers alone leave their outputs as they lie.

    Attributes:
        turned: values that were laid out anew for what needs torch's layout, layers with a choice of kernels aside.
        turn_is_known: whether the next to need it is such a layer.
        calls: of torch that were looked at.
    """

    def __init__(self, chains: Mapping[int, Chain], *, images: bool = True) -> None:
        super().__init__()
        self.chains, self.images = chains, images
        self.rows = InnerRows()
        self.waiting: dict[int, _Waiting] = {}
        self.turned, self.turn_is_known, self.calls = 0, False, 0

    def run(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """What `model` returns, laid out as torch lays it out.

        Raises:
            TraceError: an autograd function of the model's was given a norm that was recorded with another use.
        """
        before, _LOCAL.flow = getattr(_LOCAL, "flow", None), self
        try:
            with self:
                found = model(*args, **kwargs)
        finally:
            _LOCAL.flow = before
        self._finish()
        self.rows.finish(found)
        if not self.images:
            return found
        return pytree.tree_map_only(Tensor, _outer, found) if not isinstance(found, Tensor) else _outer(found)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        if func in _SHAPES:
            if func in _LAYOUTS and self.rows:
                self.rows.before(func, args, kwargs)
            return func(*args, **kwargs)
        if self.rows and self.rows.before(func, args, kwargs):
            found = func(*args, **kwargs)
            self.rows.after(found, args, kwargs)
            return found
        if func is F.batch_norm and is_flowing():
            found = self._norm(*args, **kwargs)
            return func(*args, **kwargs) if found is None else found
        if self.waiting:
            found = self._follow(func, args, kwargs)
            if found is not None:
                return found
            self._fill_all((args, kwargs))
            if _writes(func, kwargs):
                self._fill_readers_of((args, kwargs))
        if func in _MAX_POOLS and is_flowing():
            found = self._pool(*args, **kwargs)
            if found is not None:
                return found
        if func in _CONCATENATIONS and is_flowing():
            joined = _concatenated(*args, **kwargs)
            if joined is not None:
                return joined
        if func in _SPLITS and is_flowing():
            parts = _split(func, *args, **kwargs)
            if parts is not None:
                return parts
        if self.images and func in _OUTER:
            if not self.turn_is_known:
                values = pytree.tree_leaves((args, kwargs))
                self.turned += sum(v.numel() for v in values if isinstance(v, Tensor) and is_inner(v))
            self.turn_is_known = False
            if func in _VIEWS:
                _turn(args[0] if args else kwargs.get("input"))
            written = {name: kwargs[name] for name in ("out",) if name in kwargs}
            args, kwargs = pytree.tree_map_only(Tensor, _outer, (args, kwargs))
            kwargs |= written
        return func(*args, **kwargs)

    def _state_of(self, value: Any) -> _Waiting | None:
        state = self.waiting.get(id(value))
        return state if state is not None and state.tensor() is value else None

    def _wait(self, tensor: Tensor, state: _Waiting) -> Tensor:
        state.tensor = weakref.ref(tensor)
        self.waiting[id(tensor)] = state
        return tensor

    def _fill_all(self, values: Any) -> None:
        """Give all that wait among `values`, nested as they may be, their values."""
        if isinstance(values, Tensor):
            self._fill(values)
        elif isinstance(values, (list, tuple)):
            for value in values:
                self._fill_all(value)
        elif isinstance(values, dict):
            self._fill_all(tuple(values.values()))

    def _fill(self, value: Tensor) -> None:
        """Give `value` the values that the model expects in it, for a use that no chain foresaw."""
        state = self._state_of(value)
        if state is not None:
            if state.gradient and not torch.is_grad_enabled():
                _refuse_functions()
            del self.waiting[id(value)]
            with torch.set_grad_enabled(state.gradient):
                _become(value, state.compute(None, relu=False))

    def _fill_readers_of(self, values: Any) -> None:
        """Compute what reads the memory of tensors among `values`, which is about to be written to."""
        written = {_memory(value) for value in pytree.tree_leaves(values) if isinstance(value, Tensor)}
        for state in [*self.waiting.values()]:
            value = state.tensor()
            if value is not None and not written.isdisjoint(map(_memory, state.reads)):
                self._fill(value)

    def _drop_lost(self) -> None:
        """Forget what nobody holds any more; running statistics move all the same."""
        for key, state in [*self.waiting.items()]:
            if state.tensor() is None:
                del self.waiting[key]
                if not state.moved[0]:
                    with torch.no_grad():
                        state.compute(None, relu=False)

    def _finish(self) -> None:
        """Give what the model has kept its values."""
        self._drop_lost()
        for state in [*self.waiting.values()]:
            value = state.tensor()
            if value is not None:
                self._fill(value)

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The result of the sum or rectification that a norm waits for; None where `func` is neither."""
        in_place = func in _IN_PLACE
        if func in RECTIFICATIONS and args:
            return self._rectified(args[0], in_place or kwargs.get("inplace", False) or any(args[1:]))
        if func in ADDITIONS and len(args) == 2 and not kwargs and args[0] is not args[1]:
            for own, other in (args,) if in_place else (args, args[::-1]):
                state = self._state_of(own)
                if state is not None and state.chain.adds and not state.followed:
                    return self._added(own, other, state, in_place)
        return None

    def _rectified(self, own: Tensor, in_place: bool) -> Tensor | None:
        state = self._state_of(own)
        if state is None or state.result is None or state.gradient != torch.is_grad_enabled():
            return None
        result, state.result = state.result, None
        if not in_place:
            return result  # whoever reads the norm itself later finds its own values in `own`
        del self.waiting[id(own)]
        _become(own, result)
        return own

    def _added(self, own: Tensor, other: Any, state: _Waiting, in_place: bool) -> Tensor | None:
        """The norm `own` with `other` added; None where torch is to add them."""
        if not isinstance(other, Tensor) or other.shape != own.shape or other.dtype != torch.float32:
            return None
        if state.gradient != torch.is_grad_enabled():
            return None
        self._fill(other)
        compute, rectifies = state.compute, state.chain.rectifies
        out, state.followed = compute(other, relu=rectifies), True
        if in_place:
            del self.waiting[id(own)]
        if not rectifies:
            if in_place:
                _become(own, out)
            return own if in_place else out

        def again(_: Tensor | None, *, relu: bool) -> Tensor:
            return compute(other, relu=relu)

        chain, reads = Chain(adds=False, rectifies=True), (*state.reads, other)
        place = own if in_place else out.detach()
        return self._wait(place, _Waiting(state.tensor, again, chain, out, reads, state.gradient, state.moved))

    def _pool(
        self,
        x: Any = None,
        kernel_size: Any = None,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
        **others: Any,
    ) -> Tensor | None:
        """`F.max_pool2d` where the batch is innermost; None where torch is to compute it."""
        if others or kernel_size is None or type(x) is not Tensor or not is_inner(x):
            return None
        if x.dim() != 4 or x.dtype != torch.float32 or ceil_mode or return_indices:
            return None
        kernel, steps, pads, spread = (_pair(v) for v in (kernel_size, stride or kernel_size, padding, dilation))
        axes = zip(x.shape[2:], kernel, steps, pads, spread, strict=True)
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
        if (
            min(size) < 1
            or kernel[0] * kernel[1] > _MOST_TAPS
            or any(2 * p > k for p, k in zip(pads, kernel, strict=True))
        ):
            return None
        return torch.ops.growfx.max_pool(x, kernel, steps, pads, spread, size)[0]

    def _norm(
        self,
        x: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        """`F.batch_norm` where the batch is innermost; None where torch is to compute it."""
        self._fill(x)
        self._drop_lost()
        values = x.numel() // max(x.shape[1], 1) if x.dim() > 2 else 0
        if x.dtype != torch.float32 or not x.is_cpu or values < 2 or (not training and mean is None):
            return None
        given = (weight, bias, mean, variance)
        if any(t is not None and (t.dtype != torch.float32 or not t.is_contiguous()) for t in given):
            return None
        moved = [False]

        def compute(added: Tensor | None, *, relu: bool) -> Tensor:
            if not training:
                return torch.ops.growfx.norm(x, weight, bias, mean, variance, added, eps, relu)[0]
            out, of_batch, spread = torch.ops.growfx.norm(x, weight, bias, None, None, added, eps, relu)
            if mean is not None and variance is not None and not moved[0]:
                moved[0] = True
                with torch.no_grad():
                    mean.lerp_(of_batch, momentum)
                    variance.lerp_(spread * (values / (values - 1)), momentum)
            return out

        chain = None if weight is None else self.chains.get(id(weight))
        if chain is None:
            return compute(None, relu=False)
        out = None if chain.adds else compute(None, relu=True)
        place = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if out is None else out.detach()
        reads = tuple(t for t in (x, weight, bias) if t is not None)
        tensor = weakref.ref(place)
        return self._wait(place, _Waiting(tensor, compute, chain, out, reads, torch.is_grad_enabled(), moved))


class _Joined(torch.autograd.Function):
    """Tensors (N, C, ...) with their batch innermost one after another by channel, with it innermost."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.channels = [part.shape[1] for part in parts]
        size, steps = parts[0].shape, [parts[0].shape[0]]
        for length in reversed(size[2:]):
            steps.insert(0, steps[0] * length)
        steps[0] = _padded(steps[0])
        out = parts[0].new_empty_strided((size[0], sum(ctx.channels), *size[2:]), (1, *steps))
        for place, part in zip(out.split(ctx.channels, 1), parts, strict=True):
            place.copy_(part)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0].split(ctx.channels, 1)


def _padded(plane: int) -> int:
    """Values from one channel's plane to the next, as `padded_plane` of layout.h has them."""
    lines, rest = divmod(plane, 16)
    return plane if rest or lines % 8 else plane + 16 * (1 if lines < 64 else 9 - lines % 16)


def _concatenated(tensors: Any, dim: Any = 0, **others: Any) -> Tensor | None:
    """`torch.cat` by channel of images most of which lie with their batch innermost; None where torch is to do it."""
    if others or not isinstance(tensors, (list, tuple)) or len(tensors) < 2 or type(dim) is not int:
        return None
    if not all(type(part) is Tensor and part.dtype == torch.float32 and part.is_cpu for part in tensors):
        return None
    size = tensors[0].shape
    alike = all(part.shape[:1] == size[:1] and part.shape[2:] == size[2:] for part in tensors)
    if len(size) < 3 or dim not in (1, 1 - len(size)) or not alike:
        return None
    inner = [is_inner(part) for part in tensors]
    if 2 * sum(part.numel() for part, lies in zip(tensors, inner, strict=True) if lies) < sum(
        map(Tensor.numel, tensors)
    ):
        return None
    return _Joined.apply(
        *(part if lies else torch.ops.growfx.batch_inner(part) for part, lies in zip(tensors, inner, strict=True))
    )


class _Split(torch.autograd.Function):
    """Parts by channel of a tensor (N, C, ...) with its batch innermost, whose gradient has it there too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channels: list[int]) -> tuple[Tensor, ...]:
        return x.split(channels, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        joined = _concatenated(grads, 1)
        return torch.cat(grads, 1) if joined is None else joined, None


def _split(func: Any, x: Any = None, sizes: Any = None, dim: Any = 0, **others: Any) -> tuple[Tensor, ...] | None:
    """`torch.split` and `torch.chunk` by channel of images with their batch innermost; None where torch is to do it.

    Torch's gradient of a split is a concatenation, which would not lie so.
    """
    if others or type(x) is not Tensor or type(dim) is not int or not is_inner(x) or dim not in (1, 1 - x.dim()):
        return None
    channels = x.shape[1]
    if type(sizes) is int and sizes > 0 and channels > 0:
        size = -(-channels // sizes) if func in _CHUNKS else sizes
        sizes = [min(size, channels - first) for first in range(0, channels, size)]
    if func in _CHUNKS and type(sizes) is not list:
        return None
    if not isinstance(sizes, (list, tuple)) or sum(sizes) != channels or not x.requires_grad:
        return None
    return _Split.apply(x, list(sizes)) if torch.is_grad_enabled() else None


def _become(value: Tensor, found: Tensor) -> None:
    """Make the object `value`, which the model holds, the tensor `found`."""
    torch._C._swap_tensor_impl(value, found)


def _refuse_functions() -> None:
    """Refuse the forward of an autograd function, which took a tensor's gradient before its values were there."""
    kinds = [torch.autograd.Function]
    for kind in kinds:
        kinds += kind.__subclasses__()
    forwards = {getattr(kind.forward, "__code__", None) for kind in kinds}
    frame = sys._getframe()
    while frame is not None and frame.f_code is not Flow.run.__code__:
        if frame.f_code in forwards:
            raise TraceError(
                "an autograd function expected a tensor with its gradient, got a batch norm that waits for the sum or "
                'rectification that was recorded after it; call `growfx.use_kernels(net, "dense")` for a model that '
                "does not always do what was recorded"
            )
        frame = frame.f_back


def _writes(func: Any, kwargs: Any) -> bool:
    """Whether a function of torch changes one of its arguments."""
    name = getattr(func, "__name__", "")
    hidden = name.startswith("__")
    in_place = name.startswith("__i") or name == "__setitem__" if hidden else name.endswith("_")
    return in_place or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr() if value.layout == torch.strided else id(value)


def _outer(value: Tensor) -> Tensor:
    """`value` as torch lays it out."""
    return torch.ops.growfx.batch_outer(value, value.dtype) if is_inner(value) else value


def _turn(value: Any) -> None:
    """Lay out a tensor that is no view itself anew, so that what is written through a view of it is written to it."""
    if type(value) is Tensor and value._base is None and is_inner(value):
        with torch.inference_mode(value.is_inference()):
            value.data = _outer(value.detach())


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    return (int(values[0]), int(values[-1]))
