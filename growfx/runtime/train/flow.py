"""Keep activations with the batch innermost from layer to layer, under the model's own forward.

While a network runs in such a flow, its sparse convolutions leave their outputs as they are laid out in memory, batch
norms are computed there, with the sum and the rectification that follow them, and what needs another layout (pooling,
dense convolutions, views) gets it. Tensors keep their shapes and values; only their strides differ.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from growfx.runtime.train.chains import ADDITIONS, RECTIFICATIONS, Chain

__all__ = ["Flow", "is_flowing", "is_inner"]

_LOCAL = threading.local()

# What torch computes slowly, or not at all, on tensors whose batch is innermost.
_OUTER: set[Any] = {
    *(torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.interpolate, F.pad, torch.cat, torch.concat, F.pixel_shuffle),
    *(F.group_norm, F.layer_norm, F.instance_norm, F.unfold, F.linear, torch.matmul, F.channel_shuffle),
    *(torch.Tensor.view, torch.Tensor.contiguous, torch.Tensor.flatten, torch.Tensor.reshape),
    *(torch.flatten, torch.reshape, F.scaled_dot_product_attention, torch.Tensor.__matmul__, torch.bmm),
}
_IN_PLACE: set[Any] = {torch.relu_, torch.Tensor.relu_}
_MOST_TAPS = 255  # that a byte can tell apart
_MAX_POOLS: set[Any] = {F.max_pool2d, torch.max_pool2d}
_NEVER = {"__get__", "__set__", "size", "dim", "stride", "is_contiguous", "data_ptr", "numel", "ndimension", "detach"}


def is_inner(x: Tensor) -> bool:
    """Whether a tensor (N, C, ...) of images lies with its batch innermost."""
    return x.dim() > 2 and x.stride(0) == 1 and x.shape[0] > 1 and x.stride(-1) == x.shape[0]


def is_flowing() -> bool:
    """Whether this thread runs a network in a flow.

    Not where saved tensors are taken by hooks: a checkpointed part of a model is computed again outside of the flow,
    and has to save the same then.
    """
    if getattr(_LOCAL, "flow", None) is None:
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
    return hooks(True) is None


@dataclass
class _Waiting:
    """A norm whose result is still to be computed, or was rectified before the rectification was called.

    `result`: None while nothing was computed. `added`: the sum was computed into it, in place as the model sees it.
    """

    compute: Callable[..., Tensor]
    chain: Chain
    result: Tensor | None
    added: bool = False


class Flow(TorchFunctionMode):
    """One call of a network in the flow.

    Args:
        chains: what follows each norm, by the id of its weight.
    """

    def __init__(self, chains: Mapping[int, Chain]) -> None:
        super().__init__()
        self.chains = chains
        self.waiting: dict[int, tuple[Tensor, _Waiting]] = {}

    def run(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """What `model` returns, laid out as torch lays it out."""
        before, _LOCAL.flow = getattr(_LOCAL, "flow", None), self
        try:
            with self:
                found = model(*args, **kwargs)
        finally:
            _LOCAL.flow = before
        if isinstance(found, Tensor):
            return self._settled(found, outer=True)
        return pytree.tree_map_only(Tensor, lambda value: self._settled(value, outer=True), found)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and is_flowing():
            found = self._norm(*args, **kwargs)
            return func(*args, **kwargs) if found is None else found
        if self.waiting and self._waits(args) and getattr(func, "__name__", "") not in _NEVER:
            found = self._follow(func, args, kwargs)
            if found is not None:
                return found
            args, kwargs = self._all_settled(args, kwargs, outer=False)
        if func in _MAX_POOLS and is_flowing():
            found = self._pool(*args, **kwargs)
            if found is not None:
                return found
        if func in _OUTER:
            args, kwargs = self._all_settled(args, kwargs, outer=True)
        return func(*args, **kwargs)

    def _waits(self, args: Any) -> bool:
        """Whether something among the arguments waits for what follows it."""
        for value in args:
            if id(value) in self.waiting or (isinstance(value, (list, tuple)) and self._waits(value)):
                return True
        return False

    def _all_settled(self, args: Any, kwargs: Any, *, outer: bool) -> Any:
        return pytree.tree_map_only(Tensor, lambda value: self._settled(value, outer=outer), (args, kwargs))

    def _settled(self, value: Tensor, *, outer: bool) -> Tensor:
        """`value` as the model knows it, for a use that no chain foresaw."""
        entry = self.waiting.get(id(value))
        if entry is not None:
            state = entry[1]
            value = state.result if state.added and state.result is not None else state.compute(None, relu=False)
        return torch.ops.growfx.batch_outer(value, value.dtype) if outer and is_inner(value) else value

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The result of the sum or rectification that a norm waits for; None where `func` is neither."""
        if func in RECTIFICATIONS and args:
            entry = self.waiting.get(id(args[0]))
            if entry is None or entry[1].chain.adds or entry[1].result is None:
                return None
            result = entry[1].result
            in_place = func in _IN_PLACE or kwargs.get("inplace", False) or any(args[1:])
            if in_place or not torch.is_grad_enabled():
                del self.waiting[id(args[0])]
                return result
            # Whoever reads the norm itself later still finds it as it was before: another object, the same values.
            return result.view_as(result)
        if func in ADDITIONS and len(args) == 2 and not kwargs:
            for own, other in (args, args[::-1]):
                entry = self.waiting.get(id(own))
                if entry is not None and entry[1].chain.adds and not entry[1].added:
                    return self._added(own, other, entry[1])
        return None

    def _added(self, own: Tensor, other: Any, state: _Waiting) -> Tensor | None:
        """The norm `own` with `other` added; None where torch is to add them."""
        if not isinstance(other, Tensor) or other.shape != own.shape or other.dtype != torch.float32:
            return None
        added, compute, rectifies = self._settled(other, outer=False), state.compute, state.chain.rectifies
        out = compute(added, relu=rectifies)
        state.result, state.added = out, True  # what is added to in place is still known by its old name
        if rectifies:

            def again(_: Tensor | None, *, relu: bool) -> Tensor:
                return compute(added, relu=relu)

            self.waiting[id(out)] = (out, _Waiting(again, Chain(adds=False, rectifies=True), out))
        return out

    def _pool(
        self,
        x: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor | None:
        """`F.max_pool2d` where the batch is innermost; None where torch is to compute it."""
        if not is_inner(x) or x.dim() != 4 or x.dtype != torch.float32 or ceil_mode or return_indices:
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
        x = self._settled(x, outer=False)
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
        if not chain.adds:
            out = compute(None, relu=True)
            self.waiting[id(out)] = (out, _Waiting(compute, chain, out))
            return out
        place = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        self.waiting[id(place)] = (place, _Waiting(compute, chain, None))
        return place


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    return (int(values[0]), int(values[-1]))
