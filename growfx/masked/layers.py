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
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from growfx.distributed.sharded import check_cut, is_sharded, like_part, own_part, part_of, require_whole
from growfx.errors import MaskError
from growfx.masked.gradients import (
    GradientMark,
    MarkGradient,
    MaskGradient,
    MaskOwnGradient,
    compiled_weight,
    mask_gradient,
    mask_in_place,
    obeys,
)
from growfx.masked.registry import LAYER_OF

__all__ = [
    "MaskedLayer",
    "MaskedParameter",
    "check_mask",
    "has_names_of_a_twin",
    "is_maskable",
    "maskable_reason",
    "masked_class",
    "to_plain",
    "to_twin",
    "weight_name_of",
]

_OUTSIDE = (
    "outside of a forward no rank has all of it; work between `net.unshard()` and `net.reshard()`, and where a layer "
    "is sharded alone, call the layer itself"
)

# Convolutions that do not say so by their base class; named, so that nothing has to be imported.
_CONVOLUTIONS = {"timm.layers.cond_conv2d.CondConv2d"}


class _Stored:
    """The parameter that is the layer's own, and what its uses share.

    `weight`: the parameter with its gradient masked, for the layer's own use; made once, since making it anew in every
    step costs as much as a small convolution. `mask`, `address`: what it was made of. `seen`: mask and version that the
    parameter was last made to obey. `entries`, `entries_address`: the same as `weight` and `address`, for kernels that
    read active entries alone. `mark`: the gradient that was masked last. `hook`: masks the gradient of a weight
    that the model reads without calling the layer.
    """

    def __init__(self, parameter: nn.Parameter, own_mask: Tensor) -> None:
        self.parameter, self.own_mask = parameter, own_mask
        self.weight: Tensor | None = None
        self.mask: Tensor | None = None
        self.address = 0
        self.entries: Tensor | None = None
        self.entries_address = 0
        self.seen: tuple[int, int] = (0, -1)
        self.mark = GradientMark()
        self.hook: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Stored:
        return _Stored(copy.deepcopy(self.parameter, memo), copy.deepcopy(self.own_mask, memo))

    def __reduce__(self) -> Any:
        return _Stored, (self.parameter, self.own_mask)


class MaskedLayer(nn.Module):
    """What every masked twin adds to the layer it stands for.

    Attributes:
        weight: the layer's own parameter, shared with the model it came from.
        mask: bool buffer of the weight's shape; change it in place (``layer.mask.copy_(m)``) or by ``net.set_masks``.
        twin_of: the class the twin stands for.
        weight_name: the parameter the mask belongs to (`in_proj_weight` for multi-head attention).
        collects_gradient: while True, backward passes in training leave the gradient of absent edges too; the
            optimizer's step finds it masked, and `dense_gradient` keeps the whole.
        dense_gradient: what a step collected since this was set to None (shape and dtype of the weight).
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
    sharded: bool = False
    read_directly: bool = False
    _stored: _Stored
    _collects: Tensor  # `collects_gradient` as a scalar, for compiled code
    _collecting: bool = False

    @property
    def collects_gradient(self) -> bool:  # noqa: D102 - see the class
        return self._collecting

    @collects_gradient.setter
    def collects_gradient(self, wanted: bool) -> None:
        if wanted != self._collecting:
            self._collecting = wanted
            self._collects.fill_(wanted)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter the mask belongs to, as stored (outside the mask it may wait for its next use)."""
        parameter = self._parameters[self.weight_name]
        assert parameter is not None
        return parameter

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
        return self.parameter.numel()

    @property
    def density(self) -> float:
        """Active weights over all weights."""
        return self.nnz / self.numel

    # -- weight and mask ----------------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Take the parameter that is there for the layer's own, to be kept zero outside the mask in place."""
        if self._stored.parameter is not self.parameter:
            self._stored = _Stored(self.parameter, self.mask)
        self._stored.own_mask = self.mask
        LAYER_OF[id(self.parameter)] = self

    def obeys(self) -> bool:
        """Whether the stored parameter is zero outside the mask (of either sign); values on a CPU only."""
        return obeys(own_part(self.parameter.detach()), part_of(self.mask, self.parameter))

    def settle(self) -> None:
        """Make the stored parameter +0.0 outside the mask."""
        if is_sharded(self.parameter):
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
            mask_in_place(own_part(weight), part_of(self.mask, weight))

    def _settle_whole(self) -> None:
        """Do so with a whole parameter."""
        weight, mask, stored = self.parameter, self.mask, self._stored
        if stored.parameter is not weight or stored.own_mask is not mask or LAYER_OF.get(id(weight)) is not self:
            self.adopt()
            stored = self._stored
        if not mask.is_meta:
            # Through `.data`: a backward pass under way must not take this for a change of its saved weight.
            mask_in_place(weight.data, mask)
        stored.seen = self.mask_marker()

    def _weight(self, own: bool) -> Tensor:
        """The effective weight; `own`: for the one use that the layer itself makes of it."""
        # Every step passes here once per layer: registries are read directly, calls are few.
        weight, mask = self._parameters[self.weight_name], self._buffers[self.mask_name]
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
        if not (torch.is_grad_enabled() and weight.requires_grad) or self._collecting:
            return weight
        return self._with_masked_gradient(weight, mask, own)

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

    def refuses_entries(self) -> str:
        """Why this call must compute with the whole weight; "" where the active entries of the parameter are enough."""
        weight, stored = self.parameter, self._stored
        if self.gate is not None:
            return "a soft mask computes its weight"
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
        if self.read_directly:
            return self._with_masked_gradient(weight, self.mask, own=False)
        if stored.entries is None or stored.entries_address != weight.data_ptr():
            stored.entries = cast(Tensor, MarkGradient.apply(weight, stored.mark))
            stored.entries_address = weight.data_ptr()
        return stored.entries

    @contextmanager
    def _effective_parameters(self) -> Generator[None]:
        """Let the code of the original class read the effective weight under the parameter's own name."""
        # An entry of the instance's dict is found before nn.Module looks among the parameters.
        before = self.__dict__.get(self.weight_name)
        self.__dict__[self.weight_name] = self.effective_weight
        try:
            yield
        finally:
            # Other threads may be here too.
            if before is None:
                self.__dict__.pop(self.weight_name, None)
            else:
                self.__dict__[self.weight_name] = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original class's forward on the effective weight."""
        with self._effective_parameters():
            return super().forward(*args, **kwargs)

    def take_dense_gradient(self, scale: Tensor | None = None) -> None:
        """Move the gradient of the parameter, divided by `scale`, to `dense_gradient`, and leave it masked.

        What lies there already stays: a step within a step, or after clipping, finds a gradient masked before. In a
        distributed run the gradient is the mean over ranks by then, so what is chosen by it agrees.
        """
        grad = self.parameter.grad
        if grad is None:
            return
        if self.dense_gradient is None:
            part = own_part(grad)
            part = part.clone() if scale is None else part / scale
            self.dense_gradient = like_part(part, grad) if is_sharded(grad) else part
        if is_sharded(grad):
            mask_in_place(own_part(grad), part_of(self.mask, grad))
            return
        self._settle_whole()
        mask_in_place(grad, self.mask)

    def mask_marker(self) -> tuple[int, int]:
        """What is another one whenever the mask is another one."""
        return id(self.mask), self.mask._version

    def optimizer_will_step(self, scale: Tensor | None) -> None:
        """Make sure that a step of the optimizer cannot revive an edge; called before each.

        `scale`: of the loss, where the optimizer is still to divide the gradient by it.
        """
        grad = self.parameter.grad
        if is_sharded(self.parameter):
            self._settle_part()
            if self._collecting:
                self.take_dense_gradient(scale)
            elif grad is not None:
                mask_in_place(own_part(grad), part_of(self.mask, grad))
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
        self._collects = fn(self._collects).fill_(self._collecting)
        self.adopt()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
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
            "_collecting": False,
            "_collects": torch.zeros_like(self._collects),
        }

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty_twin, (self.twin_of,), {**self.__dict__, **self.state_of_a_copy()}


class MaskedParameter(MaskedLayer):
    """A mask on a parameter of a module that stays what it is: what `net.layers` has where there is no masked twin.

    For parameters that belong to no layer growfx knows (`masked=` of `growfx.wrap`), and for layers that have a `mask`
    or other names of a masked twin themselves. The mask is a buffer of the parameter's module, `<parameter>_mask`; the
    module reads the parameter itself, so it counts as read directly. It shares the registries of that module and is not
    part of the model.
    """

    read_directly = True
    twin_of = nn.Module

    def __init__(self, owner: nn.Module, weight_name: str, mask: Tensor | None = None) -> None:
        super().__init__()
        self.__dict__["owner"] = owner
        for registry in ("_parameters", "_buffers"):
            self.__dict__[registry] = owner.__dict__[registry]
        self.weight_name, self.mask_name = weight_name, f"{weight_name}_mask"
        weight = self.parameter
        if mask is not None or self.mask_name not in owner._buffers:
            owner.register_buffer(self.mask_name, torch.ones_like(weight, dtype=torch.bool) if mask is None else mask)
        self._stored = _Stored(weight, self.mask)
        self._collects = torch.zeros((), dtype=torch.bool, device=weight.device)
        LAYER_OF[id(weight)] = self

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # nothing of it is to be registered with the parameter's module

    @property
    def mask(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bool buffer `<parameter>_mask` of the parameter's module."""
        mask = self._buffers[self.mask_name]
        assert mask is not None
        return mask

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        return self.parameter

    @property
    def training(self) -> bool:
        """The mode of the parameter's module."""
        return self.__dict__["owner"].training if "owner" in self.__dict__ else True

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Set by `nn.Module`; the mode is that of the parameter's module."""

    def remove(self) -> None:
        """Take the mask away, +0.0 in its place."""
        self.settle()
        if self._stored.hook is not None:
            self._stored.hook.remove()
        if LAYER_OF.get(id(self.parameter)) is self:
            del LAYER_OF[id(self.parameter)]
        del self._buffers[self.mask_name]

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedParameter:
        clone = MaskedParameter(copy.deepcopy(self.__dict__["owner"], memo), self.weight_name)
        clone.gate = copy.deepcopy(self.gate, memo)
        return clone


class _MaskedConv(MaskedLayer):
    """A convolution that takes its weight as an argument: its gradient belongs to nobody else."""

    calls_kernel = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the original
        if self.kernel is not None:
            output = self.kernel(self, input)
            if output is not None:
                return output
        return self._conv_forward(input, self._weight(own=True), self.bias)  # type: ignore[operator]


class _MaskedLinear(MaskedLayer):
    calls_kernel = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the original
        if self.kernel is not None:
            output = self.kernel(self, input)
            if output is not None:
                return output
        return F.linear(input, self._weight(own=True), self.bias)  # type: ignore[arg-type]


class _MaskedAttention(MaskedLayer):
    """Multi-head attention: the mask belongs to the joint input projection; the output projection is a layer itself."""

    weight_name = "in_proj_weight"

    @property
    def weight(self) -> nn.Parameter:
        """The joint projection of queries, keys and values: shape (3 embed_dim, embed_dim)."""
        return self.parameter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # The original reads `out_proj.weight` without calling `out_proj`.
        out_projection: Any = self.out_proj
        with ExitStack() as stack:
            if isinstance(out_projection, MaskedLayer):
                stack.enter_context(out_projection._effective_parameters())
            return super().forward(*args, **kwargs)


def _is_watched() -> bool:
    """Whether transforms or dispatch modes run, which work on other values than the stored ones."""
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


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


_MASKED_CLASSES: dict[type[nn.Module], type[MaskedLayer]] = {}
_CONV_FORWARDS = {(kind.forward, kind._conv_forward) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def masked_class(original: type[nn.Module]) -> type[MaskedLayer]:
    """The masked twin of a layer class; one class for each original."""
    if original not in _MASKED_CLASSES:
        forwards = (getattr(original, "forward", None), getattr(original, "_conv_forward", None))
        if issubclass(original, _ConvNd) and forwards in _CONV_FORWARDS:
            base: type[MaskedLayer] = _MaskedConv
        elif issubclass(original, nn.Linear) and original.forward is nn.Linear.forward:
            base = _MaskedLinear
        elif issubclass(original, nn.MultiheadAttention):
            base = _MaskedAttention
        else:
            base = MaskedLayer
        members = {
            "twin_of": original,
            "__doc__": f"Masked twin of {original.__name__}.",
            "__module__": __name__,
        }
        _MASKED_CLASSES[original] = cast(
            type[MaskedLayer], type(f"Masked{original.__name__}", (base, original), members)
        )
    return _MASKED_CLASSES[original]


def _empty_twin(original: type[nn.Module]) -> MaskedLayer:
    kind = masked_class(original)
    return kind.__new__(kind)


def is_maskable(module: nn.Module) -> bool:
    """Whether `module` is of a kind that masks are for: a convolution, linear layer or attention."""
    if isinstance(module, (_ConvNd, nn.Linear, nn.MultiheadAttention)):
        return True
    return any(f"{kind.__module__}.{kind.__qualname__}" in _CONVOLUTIONS for kind in type(module).__mro__)


def weight_name_of(module: nn.Module) -> str:
    """The name of the parameter that the mask of a maskable module belongs to."""
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"


def maskable_reason(module: nn.Module) -> str | None:
    """Why `module` cannot have a mask though it is a convolution, linear layer or attention; None when it can.

    Raises:
        TypeError: `module` is none of these.
    """
    if not is_maskable(module):
        raise TypeError(f"`{type(module).__name__}` is no convolution, linear layer or attention")
    name = weight_name_of(module)
    weight = module._parameters.get(name)
    if weight is None and isinstance(module, nn.MultiheadAttention):
        return (
            "its projections of queries, keys and values are three parameters (`kdim` or `vdim` is not `embed_dim`); "
            "`masked=` can name them"
        )
    if weight is None:
        return f"`{name}` is computed by a parametrization or a hook; `masked=` can name the parameter behind it"
    if isinstance(weight, UninitializedParameter):
        return "its weight has no shape before the first call"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not a floating-point tensor"
    return None


def has_names_of_a_twin(module: nn.Module) -> bool:
    """Whether a layer has a `mask`, or another name of a masked twin, of its own that becoming one would hide."""
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn.modules"):
            break
        own |= {*vars(kind)}
    return not own.isdisjoint(_NAMES)


_NAMES = {*vars(MaskedLayer), "mask", "twin_of"} - {*dir(nn.Module), "__annotations__", "forward", "weight"}


def to_twin(module: nn.Module, mask: Tensor | None = None) -> MaskedLayer:
    """Turn `module` into its masked twin, in place, with all weights active unless `mask` is given."""
    kind = masked_class(type(module))
    module.__class__ = kind
    assert isinstance(module, MaskedLayer)
    weight = module.parameter
    module.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool) if mask is None else mask)
    module._stored = _Stored(weight, module.mask)
    module._collects = torch.zeros((), dtype=torch.bool, device=weight.device)
    LAYER_OF[id(weight)] = module
    return module


def to_plain(module: MaskedLayer) -> nn.Module:
    """Turn a masked twin back into the layer it stands for, in place, +0.0 outside its mask."""
    module.settle()
    if LAYER_OF.get(id(module.parameter)) is module:
        del LAYER_OF[id(module.parameter)]
    if module._stored.hook is not None:
        module._stored.hook.remove()
    del module._buffers["mask"], module._stored, module._collects
    for name in ("read_directly", "sharded", "dense_gradient", "gate", "kernel", "_collecting"):
        module.__dict__.pop(name, None)
    original: Any = module.twin_of
    module.__class__ = original
    return module


def check_mask(name: str, own: Tensor, mask: object) -> Tensor:
    """Return `mask` if it can replace `own`, the mask of the layer `name`.

    Raises:
        MaskError: it is no bool tensor of the same shape.
    """
    shape = tuple(own.shape)
    if not isinstance(mask, Tensor):
        raise MaskError(f"mask of `{name}` is a {type(mask).__name__}; give a bool tensor of shape {shape}")
    if mask.dtype != torch.bool:
        raise MaskError(f"mask of `{name}` is {mask.dtype}; give a bool tensor (for example `mask != 0`)")
    if tuple(mask.shape) != shape:
        raise MaskError(f"mask of `{name}` has shape {tuple(mask.shape)}; its weight has shape {shape}")
    return mask
