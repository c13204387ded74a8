"""Masked twins: the modules of a model with a mask beside their weight.

A twin is a subclass of the layer it stands for (`MaskedConv2d(MaskedLayer, nn.Conv2d)`), made on demand for any
convolution, linear layer or multi-head attention and for any subclass of these. The parameter stays where it was
and keeps its name; a bool buffer `mask` stands beside it.

What a twin computes with is always ``where(mask, weight, 0)``, and nothing is remembered of either: whatever wrote to
them (an in-place operator, ``.data``, numpy, a fused optimizer, an average) is seen by the next use. In training the
parameter itself is made zero outside the mask, in place, before each use, which costs a pass over the weights; its
gradient is masked where it is produced, and the optimizer's state is cleared where a mask changes, so zero weight, zero
gradient and zero state leave nothing that could revive an edge. Elsewhere (evaluation, frozen weights) nothing is
written: the parameter is used directly where it is zero outside the mask, as it nearly always is, and masked at use
where it is not (an average that still remembers an edge that was dropped).

A layer may keep the values of its present edges only (`growfx.masked.present`): then they are the parameter, and the
weight is built of them for each use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from growfx.distributed.sharded import check_cut, is_sharded, local_shard, part_of, require_whole, with_local_shard
from growfx.errors import MaskError
from growfx.masked.absent_gradient import AbsentGradient
from growfx.masked.gradients import (
    MarkGradient,
    MaskGradient,
    MaskOwnGradient,
    compiled_weight,
    mask_gradient,
    mask_in_place,
    obeys,
)
from growfx.masked.present.state_dicts import load_whole, saved_whole
from growfx.masked.present.values import PresentValues, scattered
from growfx.masked.registry import LAYER_OF
from growfx.masked.stored import Stored
from growfx.masked.weight_reads import THREAD

__all__ = ["MaskedLayer", "check_mask"]

_OUTSIDE = (
    "outside of a forward no rank has all of it; work between `net.unshard()` and `net.reshard()`, and where a layer "
    "is sharded alone, call the layer itself"
)


class MaskedLayer(nn.Module):
    """What every masked twin adds to the layer it stands for.

    Attributes:
        weight: the layer's own parameter, shared with the model it came from.
        mask: bool buffer of the weight's shape; change it in place (``layer.mask.copy_(m)``, ``layer.mask = m``) or by
            ``net.set_masks``.
        twin_of: the class the twin stands for.
        weight_name: the parameter the mask belongs to (`in_proj_weight` for multi-head attention).
        collects_gradient: while True, backward passes in training make the gradient of absent edges too. It is kept
            apart from that of the parameter, and `dense_gradient` has the whole from the optimizer's step on.
        dense_gradient: what a step collected since this was set to None (shape and dtype of the weight).
        present: None, or what the layer has in the place of its weight: the values of its present edges.
        sharded: whether the parameter was seen to be spread over ranks (`fully_shard`).
        read_directly: whether the model reads the weight without calling the layer (`F.linear(x, self.qkv.weight)`, a
            tied embedding).
        gate: None, or what turns the parameter into the weight the layer uses, instead of the mask (a soft mask).
        kernel: None, or what computes the layer over its active entries alone (`growfx.use_kernels`): called with the
            layer and its input, returns the output or None where torch's dense kernels are to compute it.
        calls_kernel: whether the forward of the class asks for it.
    """

    twin_of: ClassVar[type[nn.Module]]
    weight_name: str = "weight"
    mask_name: str = "mask"
    mask: Tensor
    dense_gradient: Tensor | None = None
    gate: Callable[[Tensor], Tensor] | None = None
    kernel: Callable[[MaskedLayer, Tensor], Tensor | None] | None = None
    calls_kernel: ClassVar[bool] = False
    present: PresentValues | None = None
    sharded: bool = False
    read_directly: bool = False
    _stored: Stored
    _collects: Tensor  # `collects_gradient` as a scalar, for compiled code
    _collecting: bool = False
    _lent: PresentValues | None = None  # what `present` will be again

    @property
    def collects_gradient(self) -> bool:  # noqa: D102 - see the class
        return self._collecting

    @collects_gradient.setter
    def collects_gradient(self, wanted: bool) -> None:
        if wanted != self._collecting:
            self._collecting = wanted
            self._collects.fill_(wanted)
            if wanted:
                self._watch_gradient()
            elif self._stored.absent is not None:
                self._stored.absent.close()
                self._stored.absent = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter the mask belongs to, as stored (outside the mask it may wait for its next use).

        Where values of present edges are kept, a copy made of them for reading.
        """
        if self.present is not None:
            return self.present.as_parameter(self.mask)
        parameter = self._parameters.get(self.weight_name)  # `[]` would be a read by others: see growfx.weight_reads
        assert parameter is not None
        return parameter

    @property
    def trained(self) -> nn.Parameter:
        """The parameter that optimizers know: the weight, or the values of its present edges."""
        present = self.present or self._lent
        return self.parameter if present is None else present.values

    def edges(self) -> Tensor:
        """The values of present edges, in the order of the mask, a copy: shape (nnz)."""
        if self.present is None:
            return self.parameter.detach()[self.mask]
        self.present.follow(self.mask)
        return self.present.values.detach().clone()

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of the weight, in its shape, as a backward pass left it; None without one."""
        return self.parameter.grad if self.present is None else self.present.whole_gradient(self.mask)

    @property
    def effective_weight(self) -> Tensor:
        """``where(mask, weight, 0)``: shape and dtype of the weight, differentiable with a masked gradient."""
        return self._weight(own=False)

    @property
    def nnz(self) -> int:
        """Number of active weights (an active weight may be zero)."""
        # Values on the meta device cannot be counted.
        return self.mask.numel() if self.mask.is_meta else int(torch.count_nonzero(self.mask))

    @property
    def numel(self) -> int:
        """Number of weights, active or not."""
        return self.mask.numel()

    @property
    def density(self) -> float:
        """Active weights over all weights."""
        return self.nnz / self.numel

    # -- weight and mask ----------------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Take the parameter that is there for the layer's own, to be kept zero outside the mask in place."""
        if self.present is not None:
            values = self._parameters["values"]
            assert values is not None
            self.present.values, self._stored.own_mask = values, self.mask
            LAYER_OF[id(values)] = self
            return
        if self._stored.parameter is not self.parameter:
            if self._stored.absent is not None:
                self._stored.absent.close()  # the mask is not that parameter's any more
            self._stored = Stored(self.parameter, self.mask)
        self._stored.own_mask = self.mask
        LAYER_OF[id(self.parameter)] = self

    def obeys(self) -> bool:
        """Whether the stored parameter is zero outside the mask (of either sign); values on a CPU only."""
        return self.present is not None or obeys(
            local_shard(self.parameter.detach()), part_of(self.mask, self.parameter)
        )

    def settle(self) -> None:
        """Make the stored parameter +0.0 outside the mask."""
        if self.present is not None:
            self.present.follow(self.mask)
        elif is_sharded(self.parameter):
            self._settle_part()
        else:
            self._settle_whole()

    def _settle_part(self) -> None:
        """Do so with the rows that this rank has."""
        weight = self.parameter
        if LAYER_OF.get(id(weight)) is not self:
            check_cut(weight)
            self.sharded = True
            self.adopt()
        if not self.mask.is_meta:
            mask_in_place(local_shard(weight), part_of(self.mask, weight))

    def _settle_whole(self) -> None:
        """Do so with a whole parameter."""
        weight, mask, stored = self.parameter, self.mask, self._stored
        if stored.parameter is not weight or stored.own_mask is not mask or LAYER_OF.get(id(weight)) is not self:
            self.adopt()
            stored = self._stored
        if not mask.is_meta:
            is_new = stored.seen != self.mask_marker()
            if (self.read_directly or is_new) and torch._C._is_any_autocast_enabled():
                torch.clear_autocast_cache()  # it may hold the weight of the mask before
            loses = is_new and not weight.is_inference() and not obeys(weight.data, mask)
            # Through `.data`: a backward pass under way must not take this for a change of its saved weight, unless
            # edges go that it has used.
            mask_in_place(weight.data, mask)
            if loses:
                torch.autograd.graph.increment_version(weight)
        stored.seen = self.mask_marker()

    def _weight(self, own: bool) -> Tensor:
        """The effective weight; `own`: for the one use that the layer itself makes of it."""
        if self.present is not None:
            return self._built_weight()
        # Every step passes here once per layer: registries are read directly, calls are few.
        weight, mask = self._parameters.get(self.weight_name), self._buffers[self.mask_name]
        assert weight is not None
        assert mask is not None
        if self.gate is not None:
            return self.gate(weight)
        if torch.compiler.is_compiling():
            if self.training:
                return compiled_weight(weight, mask, self._collects)
            return torch.where(mask, weight, 0)
        with torch._C.DisableTorchFunction():  # no use of the model's, nothing to be recorded
            return self._eager_weight(weight, mask, own)

    def _built_weight(self) -> Tensor:
        """The effective weight where values of present edges are kept."""
        present, values, mask = self.present, self._parameters["values"], self.mask
        assert present is not None
        assert values is not None
        with torch._C.DisableTorchFunction():
            if values is not present.values or _is_watched():  # somebody else's, or within a transform
                return scattered(values, mask)
            collects = self._collecting and self.training and torch.is_grad_enabled()
            return present.whole(mask, collects=collects)

    # Its size is another one whenever masks change: compiled code calls it as it is.
    _built_weight._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _built_anew(self, weight: Tensor) -> AbstractContextManager[Any]:
        """A block in which a weight that was built of values is not saved for the backward pass."""
        if self.present is None or torch.compiler.is_compiling() or _is_watched():
            return nullcontext()
        return self.present.rebuilt(weight, self.mask)

    def _eager_weight(self, weight: nn.Parameter, mask: Tensor, own: bool) -> Tensor:
        if self.sharded:
            require_whole(weight, _OUTSIDE)
        if mask.is_meta:  # no values to mask, and torch's shape function of `where` is slow
            return weight
        # What stands in for the parameter (`functional_call`, transforms, proxies) is somebody else's: not written to.
        stored = self._stored
        is_own = self.sharded or (stored.parameter is weight and stored.own_mask is mask)
        if not is_own or _is_watched():
            require_whole(weight, _OUTSIDE)
            return compiled_weight(weight, mask, self._collects) if self._collecting else torch.where(mask, weight, 0)
        if not self._store_obeys(weight, mask):
            return torch.where(mask, weight, 0)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight
        if self._collecting:
            self._watch_gradient()
            return weight
        return self._with_masked_gradient(weight, mask, own)

    def _watch_gradient(self) -> None:
        """Let backward passes leave a masked gradient, and the rest of it with `Stored.absent`."""
        weight = None if self.present is not None or self.sharded else self._parameters.get(self.weight_name)
        if weight is None or not weight.requires_grad or not weight.is_leaf or is_sharded(weight):
            return  # there are values of present edges, no gradient, or one that comes from several ranks
        stored = self._stored
        if stored.absent is None or not stored.absent.watches(weight):
            stored.absent = AbsentGradient(weight, _mask_while_collecting(self))
        if not torch.compiler.is_compiling():
            stored.absent.forward_runs()

    def _store_obeys(self, weight: Tensor, mask: Tensor) -> bool:
        """Whether the parameter can be used as stored; in training it is made so, elsewhere nothing is written."""
        if self.training and torch.is_grad_enabled() and weight.requires_grad:
            self._settle_whole()
            return True
        return obeys(weight.detach(), mask)

    def can_be_read(self) -> bool:
        """Whether code that reads the parameter itself finds the effective weight, with its gradient masked.

        Asked before the forward of a model that reads the weight without calling the layer.
        """
        if self.present is not None:
            return True  # what is read is built
        with torch._C.DisableTorchFunction():
            return self._can_be_read(self.parameter, self.mask)

    def _can_be_read(self, weight: nn.Parameter, mask: Tensor) -> bool:
        is_own = self._stored.parameter is weight and self._stored.own_mask is mask
        if self.gate is not None or self.sharded or not is_own or _is_watched():
            return False
        if mask.is_meta:
            return True
        if not self._store_obeys(weight, mask):
            return False
        if torch.is_grad_enabled() and weight.requires_grad:
            self._with_masked_gradient(weight, mask, own=False)
        return True

    def _with_masked_gradient(self, weight: nn.Parameter, mask: Tensor, own: bool) -> Tensor:
        stored = self._stored
        if self.read_directly:
            if stored.hook is None:
                stored.hook = weight.register_hook(_gradient_hook(self))
            if self._collecting:
                self._watch_gradient()
            return weight
        if not own:
            return cast(Tensor, MaskGradient.apply(weight, mask, stored.mark))
        # FSDP reduces what its modules' own backward made: the node that masks must be younger than their inputs.
        if self.sharded:
            return cast(Tensor, MaskOwnGradient.apply(weight, mask, stored.mark))
        if stored.weight is None or stored.mask is not mask or stored.address != weight.data_ptr():
            stored.weight = cast(Tensor, MaskOwnGradient.apply(weight, mask, stored.mark))
            stored.mask, stored.address = mask, weight.data_ptr()
        return stored.weight

    def weight_for_reader(self, weight: Tensor) -> Tensor:
        """What code finds that reads the parameter under its name, of the model or of anybody else.

        The layer's own code, and the model's while the net runs it, find the effective weight. Elsewhere it is the
        parameter itself, made to obey the mask before: a submodule that is called alone computes what the net does.
        """
        if torch.compiler.is_compiling():
            return self._weight(own=False)
        own = THREAD.own.get(id(self))
        if own is not None:
            return own[-1]
        if THREAD.calls:
            readable = THREAD.calls[-1]
            if readable is None or id(self) in readable:
                return weight
            self.read_directly = True  # in a branch that was not seen before
            return weight if self.can_be_read() else self.effective_weight
        with torch._C.DisableTorchFunction():
            if torch._C._current_graph_task_id() != -1:  # a forward that is run anew for its backward pass
                return weight if self.can_be_read() else self.effective_weight
            if self.gate is None and not _is_watched() and not self.sharded and not is_sharded(weight):
                self._settle_for_reader(weight)
        return weight

    def built_for_reader(self) -> Tensor:
        """What code finds that reads the weight where values of present edges are kept."""
        own = THREAD.own.get(id(self))
        if own is not None:
            return own[-1]
        if THREAD.calls or self.present is None or torch.compiler.is_compiling():
            return self.effective_weight
        with torch._C.DisableTorchFunction():
            return self.present.read_only(self.mask)

    def _settle_for_reader(self, weight: Tensor) -> None:
        mask = self.mask
        if not isinstance(weight, nn.Parameter) or mask.is_meta or weight.shape != mask.shape:
            return
        if not self._store_obeys(weight, mask):
            self._settle_whole()
        if self.read_directly and self._stored.parameter is weight and torch.is_grad_enabled() and weight.requires_grad:
            self._with_masked_gradient(weight, mask, own=False)

    def refuses_entries(self) -> str:
        """Why this call must compute with the whole weight; "" where the active entries of the parameter are enough."""
        if self.gate is not None:
            return "a soft mask computes its weight"
        if self.present is not None:
            whole = self._collecting and self.training and torch.is_grad_enabled()
            if self._parameters.get("values") is not self.present.values or self.mask.is_meta or _is_watched():
                return "something stands in for its weight"
            return "the step needs the gradient of absent edges" if whole else ""
        weight, stored = self.parameter, self._stored
        if self.sharded or is_sharded(weight):
            return "its weight is spread over ranks"
        if self._collecting and self.training and torch.is_grad_enabled():
            return "the step needs the gradient of absent edges"
        if stored.parameter is not weight or stored.own_mask is not self.mask or self.mask.is_meta or _is_watched():
            return "something stands in for its weight"
        return ""

    def weight_of_entries(self) -> Tensor:
        """The parameter, for a kernel that reads active entries alone and whose gradient is zero elsewhere."""
        weight, stored = self.parameter, self._stored
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight
        if LAYER_OF.get(id(weight)) is not self:  # of a copy: the optimizer's steps would not find the layer
            self.adopt()
        if self.read_directly:
            return self._with_masked_gradient(weight, self.mask, own=False)
        made_of = (weight.data_ptr(), *self.mask_marker())
        if stored.entries is None or stored.entries_of != made_of:
            stored.entries = cast(Tensor, MarkGradient.apply(weight, self.mask, stored.mark))
            stored.entries_of = made_of
        return stored.entries

    @contextmanager
    def _effective_parameters(self) -> Generator[None]:
        """Let the code of the original class read the effective weight under the parameter's own name."""
        weight = self.effective_weight
        if torch.compiler.is_compiling():
            # An entry of the instance's dict is found first.
            self.__dict__[self.weight_name] = weight
            try:
                yield
            finally:
                self.__dict__.pop(self.weight_name, None)
            return
        # Of this thread alone, and again within itself where the forward calls the layer anew.
        weights = THREAD.own.setdefault(id(self), [])
        weights.append(weight)
        try:
            yield
        finally:
            weights.pop()
            if not weights:
                del THREAD.own[id(self)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original class's forward on the effective weight."""
        with self._effective_parameters():
            return super().forward(*args, **kwargs)

    def take_dense_gradient(self, scale: Tensor | None = None) -> None:
        """Move the gradient of the parameter, divided by `scale`, to `dense_gradient`, and leave it masked.

        What lies there already stays: a step within a step, or after clipping, finds a gradient masked before. In a
        distributed run the gradient is the mean over ranks by then, so what is chosen by it agrees.
        """
        if self.present is not None:
            found = self.present.take_collected()
            if found is not None and self.dense_gradient is None:
                self.dense_gradient = found if scale is None else found / scale
            return
        grad, absent = self.parameter.grad, self._stored.absent
        if grad is None:
            return
        if self.dense_gradient is None:
            kept = absent.take() if absent is not None and absent.watches(self.parameter) else None
            part = local_shard(grad.detach())
            part = part.clone() if kept is None else kept.add_(part)
            part = part if scale is None else part / scale
            self.dense_gradient = with_local_shard(part, grad) if is_sharded(grad) else part
        if is_sharded(grad):
            mask_in_place(local_shard(grad), part_of(self.mask, grad))
            return
        self._settle_whole()
        mask_in_place(grad, self.mask)

    def forget_dense_gradient(self) -> None:
        """Forget the gradient of absent edges, of a step that is not made or of one that is over."""
        self.dense_gradient = None
        if self.present is not None:
            self.present.take_collected()
        elif self._stored.absent is not None:
            self._stored.absent.take()

    def mask_marker(self) -> tuple[int, int]:
        """What is another one whenever the mask is another one."""
        return id(self.mask), self.mask._version

    def optimizer_will_step(self, scale: Tensor | None) -> None:
        """Make sure that a step of the optimizer cannot revive an edge; called before each.

        `scale`: of the loss, where the optimizer is still to divide the gradient by it.
        """
        if self.present is not None:
            self.present.follow(self.mask, by_version=True)
            if self._collecting:
                self.take_dense_gradient(scale)
            return
        grad = self.parameter.grad
        if is_sharded(self.parameter):
            self._settle_part()
            if self._collecting:
                self.take_dense_gradient(scale)
            elif grad is not None:
                mask_in_place(local_shard(grad), part_of(self.mask, grad))
            return
        changed = self._stored.seen != self.mask_marker()
        if changed:
            self._settle_whole()
        if self._collecting:
            self.take_dense_gradient(scale)
        elif grad is not None and (changed or not self._stored.mark.is_of(grad)):
            mask_gradient(grad, self.mask)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> MaskedLayer:
        super()._apply(fn, recurse)
        self._collects = fn(self._collects).bool().fill_(self._collecting)
        self.keep_mask_bool()
        self.adopt()
        return self

    def keep_mask_bool(self) -> None:
        """Undo what `net.type(torch.float64)` does to every buffer."""
        mask = self._buffers[self.mask_name]
        if mask is not None and mask.dtype != torch.bool:
            self._buffers[self.mask_name] = mask != 0

    def has_parameter(self) -> bool:
        """Whether the layer has its weight, or the values in its place."""
        return self._parameters.get(self.weight_name if self.present is None else "values") is not None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == self.weight_name and self.present is not None:
            raise MaskError(
                f"the weight of `{self.present.name}` is read-only: its values are kept for present edges only "
                f'(`storage` = "present"), got a {type(value).__name__} to take its place; load a state dict, or call '
                '`growfx.use_kernels(net, storage="dense")` first'
            )
        if name == self.mask_name and self._buffers.get(name) is not None:
            self._take_mask(value)
            return
        held = self.__dict__.get("_parameters", {})
        if name == self.weight_name and name in held and (is_sharded(value) or is_sharded(held[name])):
            held[name] = value  # as `fully_shard` does with other modules: torch's way would read the weight first
            return
        super().__setattr__(name, value)

    def _take_mask(self, mask: Any) -> None:
        """Have `mask` from now on, in the tensor that is there: layers that share a weight share it.

        Raises:
            MaskError: it is not a bool tensor of the weight's shape.
        """
        own = self.mask
        check_mask(type(self).__name__, own, mask)
        if own.is_meta or mask.device != own.device:
            self._buffers[self.mask_name] = mask
        else:
            own.copy_(mask)

    # -- state dicts --------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.present is not None:
            load_whole(self, super()._load_from_state_dict, *args, **kwargs)
            return
        before = self._buffers[self.mask_name]
        super()._load_from_state_dict(*args, **kwargs)
        after = self._buffers[self.mask_name]
        if before is None or after is None or after is before or before.is_meta:
            return
        if after.shape != before.shape or after.device != before.device:
            return
        # `assign` put another tensor in place; layers that share a weight share their mask, so it is written into.
        before.copy_(after)
        self._buffers[self.mask_name] = before

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.present is not None:
            weight = self.effective_weight if keep_vars else self.parameter.detach()
            saved_whole(self, super()._save_to_state_dict, destination, prefix, weight)
            return
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.parameter
        # Looking changes nothing: what is stored outside the mask stays, and is left out of what is handed out.
        if not keep_vars and not is_sharded(weight) and not weight.is_meta and not self.obeys():
            destination[prefix + self.weight_name] = torch.where(self.mask, weight.detach(), 0)

    def extra_repr(self) -> str:
        """The original class's line with the layer's density."""
        return f"{super().extra_repr()}, density={self.density:.4g}"

    def state_of_a_copy(self) -> dict[str, Any]:
        """Attributes that begin anew in a copy: it is not spread over ranks, and collects nothing."""
        return {
            "sharded": False,
            "dense_gradient": None,
            "kernel": None,
            "_lent": None,  # a copy has what it is copied with for its own
            "_collecting": False,
            "_collects": torch.zeros_like(self._collects),
        }


def _is_watched() -> bool:
    """Whether transforms or dispatch modes run, which work on other values than the stored ones."""
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


def _mask_while_collecting(layer: MaskedLayer) -> Callable[[], Tensor | None]:
    """What gives the mask, or None once the layer is gone or collects no more gradients."""
    reference = weakref.ref(layer)

    def mask() -> Tensor | None:
        layer = reference()
        return layer.mask if layer is not None and layer._collecting else None

    return mask


def _gradient_hook(layer: MaskedLayer) -> Callable[[Tensor], Tensor | None]:
    """Mask the whole gradient of a parameter that the model reads in several places."""
    reference = weakref.ref(layer)

    def hook(gradient: Tensor) -> Tensor | None:
        layer = reference()
        if layer is None or layer._collecting or layer.gate is not None:
            return None
        if torch.is_grad_enabled() and not gradient.is_sparse:  # a second derivative is wanted
            return torch.where(layer.mask, gradient, 0)
        masked = mask_gradient(gradient.clone(), layer.mask)
        layer._stored.mark.put(masked)
        return masked

    return hook


def check_mask(name: str, own: Tensor, mask: object) -> Tensor:
    """Return `mask` if it can replace `own`, the mask of the layer `name`.

    Raises:
        MaskError: it is not a bool tensor of the same shape.
    """
    shape = tuple(own.shape)
    if not isinstance(mask, Tensor):
        raise MaskError(f"mask of `{name}` is a {type(mask).__name__}; give a bool tensor of shape {shape}")
    if mask.dtype != torch.bool:
        raise MaskError(f"mask of `{name}` is {mask.dtype}; give a bool tensor (for example `mask != 0`)")
    if tuple(mask.shape) != shape:
        raise MaskError(f"mask of `{name}` has shape {tuple(mask.shape)}; its weight has shape {shape}")
    return mask
