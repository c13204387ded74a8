"""Masked twins: the modules of a model with a mask beside their weight.

A twin is a subclass of the layer it stands for (`MaskedConv2d(MaskedLayer, nn.Conv2d)`), made on demand for any
convolution, linear layer or multi-head attention and for any subclass of these. The parameter stays where it was
and keeps its name; a bool buffer `mask` stands beside it.

What a twin computes with is always ``where(mask, weight, 0)``. While training that costs next to nothing, because
the parameter itself *is* zero outside the mask and stays so: its gradient is masked where it is produced, and the
optimizer's state is cleared there when a mask changes, so zero weight, zero gradient and zero state leave nothing
that could revive an edge. Whatever else touches parameter or mask (a manual edit, a loaded state dict, a copy into
an average) is seen by its version counter and mended before the next use; so are a gradient or an optimizer's state
that others changed, before the optimizer's next step. Without gradients the mask is applied at use. An edit through
``.data`` leaves no trace in the version counter: one of a weight is mended by ``train()``, ``eval()``,
``state_dict()`` and every use without gradients, but not between two training steps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from growfx.compiled_weight import compiled_weight
from growfx.errors import MaskError
from growfx.masked_gradient import GradientMark, MaskGradient, MaskOwnGradient, keep_bits, mask_in_place
from growfx.optimizer_hooks import LAYER_OF
from growfx.shards import check_cut, is_sharded, like_part, own_part, part_of, require_whole

__all__ = [
    "MaskedLayer",
    "check_mask",
    "is_maskable",
    "maskable_reason",
    "masked_class",
    "to_plain",
    "to_twin",
]

_OUTSIDE = (
    "outside of a forward no rank has all of it; work between `net.unshard()` and `net.reshard()`, and where a layer "
    "is sharded alone, call the layer itself"
)

# Convolutions that do not say so by their base class; named, so that nothing has to be imported.
_CONVOLUTIONS = {"timm.layers.cond_conv2d.CondConv2d"}


@dataclass
class _Settled:
    """Which tensors, at which version, were last seen to obey each other.

    `keep`: bits of the mask, None where all weights are active. `own`: the weight with its gradient masked, for the
    layer's own use; made once, since making it anew in every step costs as much as a small convolution. `mark`: the
    gradient that was masked last.
    """

    weight: Tensor
    mask: Tensor
    weight_version: int
    mask_version: int
    data: int
    nnz: int
    keep: Tensor | None = None
    own: Tensor | None = None
    mark: GradientMark = field(default_factory=GradientMark)


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
        gate: None, or what turns the parameter into the weight the layer uses, instead of the mask (a soft mask).
    """

    twin_of: ClassVar[type[nn.Module]]
    weight_name: ClassVar[str] = "weight"
    mask: Tensor
    dense_gradient: Tensor | None = None
    gate: Callable[[Tensor], Tensor] | None = None
    sharded: bool = False
    _settled: _Settled | None
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
        if self.gate is not None:
            return self.gate(self.parameter)
        found = self._training_weight()
        if found is None:
            return self._masked_at_use()
        weight, settled = found
        return weight if settled is None else MaskGradient.apply(weight, settled.keep, settled.mark)

    @property
    def nnz(self) -> int:
        """Number of active weights (an active weight may be zero)."""
        settled = self._settled
        if settled is None or settled.mask is not self.mask or settled.mask_version != self.mask._version:
            return int(torch.count_nonzero(self.mask))
        return settled.nnz

    @property
    def numel(self) -> int:
        """Number of weights, active or not."""
        return self.parameter.numel()

    @property
    def density(self) -> float:
        """Active weights over all weights."""
        return self.nnz / self.numel

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
            LAYER_OF[id(weight)] = self
            self.sharded, self._settled = True, None
        if not self.mask.is_meta and self.nnz < self.numel:
            mask_in_place(own_part(weight), part_of(self.mask, weight))

    def _settle_whole(self) -> _Settled:
        """Do so with a whole parameter, and note which versions of parameter and mask that was."""
        weight, mask, settled = self.parameter, self.mask, self._settled
        if settled is None or settled.mask is not mask or settled.mask_version != mask._version:
            # Values on the meta device cannot be counted.
            nnz = mask.numel() if mask.is_meta else int(torch.count_nonzero(mask))
            settled = _Settled(weight, mask, weight._version, mask._version, weight.data_ptr(), nnz)
        if settled.nnz < mask.numel():
            if self.sharded:
                # Bits of all weights would be a lot beside a part of the weights.
                settled.keep = mask
            elif settled.keep is None:
                settled.keep = keep_bits(mask)
            # Through `.data`: a backward pass under way must not take this for a change of its saved weight.
            mask_in_place(weight.data, settled.keep)
        # FSDP reduces what its modules' own backward made: the node that masks must be younger than their inputs.
        if self.sharded or settled.weight is not weight or settled.data != weight.data_ptr():
            settled.own = None
        settled.weight, settled.weight_version, settled.data = weight, weight._version, weight.data_ptr()
        LAYER_OF[id(weight)] = self
        self._settled = settled
        return settled

    def _training_weight(self) -> tuple[Tensor, _Settled | None] | None:
        """The parameter, settled, where its gradient is wanted in training; None where the mask applies at use.

        The second is None where nothing of the gradient is to be masked.
        """
        # Every training step passes here once per layer: registries are read directly, calls are few.
        weight, mask, settled = self._parameters[self.weight_name], self._buffers["mask"], self._settled
        assert weight is not None
        assert mask is not None
        if not self.training or not torch.is_grad_enabled() or not weight.requires_grad:
            return None
        if torch.compiler.is_compiling():
            return None
        if (
            settled is None
            # Gathered anew for each use, which no version tells.
            or self.sharded
            or settled.weight_version != weight._version
            or settled.mask_version != mask._version
            or settled.weight is not weight
            or settled.mask is not mask
            or settled.data != weight.data_ptr()
        ):
            require_whole(weight, _OUTSIDE)
            settled = self._settle_whole()
        return weight, None if settled.keep is None or self._collecting else settled

    def _masked_at_use(self) -> Tensor:
        require_whole(self.parameter, _OUTSIDE)
        if self.mask.is_meta:  # no values to mask, and torch's shape function of `where` is slow
            return self.parameter
        if self.training and torch.compiler.is_compiling():
            return compiled_weight(self.parameter, self.mask, self._collects)
        return torch.where(self.mask, self.parameter, 0)

    def _own_weight(self) -> Tensor:
        """The effective weight for the one use that the layer itself makes of it."""
        if self.gate is not None:
            return self.gate(self.parameter)
        found = self._training_weight()
        if found is None:
            return self._masked_at_use()
        weight, settled = found
        if settled is None:
            return weight
        own = settled.own
        if own is None:
            own = settled.own = cast(Tensor, MaskOwnGradient.apply(weight, settled.keep, settled.mark))
        return own

    @contextmanager
    def _effective_parameters(self) -> Generator[None]:
        """Let the code of the original class read the effective weight under the parameter's own name."""
        # An entry of the instance's dict is found before nn.Module looks among the parameters.
        self.__dict__[self.weight_name] = self.effective_weight
        try:
            yield
        finally:
            del self.__dict__[self.weight_name]

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
        keep = self._settle_whole().keep
        if keep is not None:
            mask_in_place(grad, keep)

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
        settled = self._settled
        if settled is None or settled.mask is not self.mask or settled.mask_version != self.mask._version:
            settled = self._settle_whole()
        if self._collecting:
            self.take_dense_gradient(scale)
        elif settled.keep is not None and grad is not None and not settled.mark.is_of(grad):
            mask_in_place(grad, settled.keep)

    def optimizer_stepped(self, version_before: int) -> None:
        """Note that the parameter changed by a step that keeps zeros; `version_before` was its version."""
        # An optimizer with masked gradient and clean state keeps zeros: its own step is no reason to look again.
        settled = self._settled
        if settled is not None and settled.weight is self.parameter and settled.weight_version == version_before:
            settled.weight_version = self.parameter._version

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> MaskedLayer:
        super()._apply(fn, recurse)
        self._collects = fn(self._collects).fill_(self._collecting)
        return self

    def extra_repr(self) -> str:
        """The original class's line with the layer's density."""
        return f"{super().extra_repr()}, density={self.density:.4g}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The version counters of a copy's tensors start again: what was seen of the original says nothing of them.
        anew = {
            "sharded": False,
            "_settled": None,
            "dense_gradient": None,
            "_collecting": False,
            "_collects": torch.zeros_like(self._collects),
        }
        return _empty_twin, (self.twin_of,), {**self.__dict__, **anew}


class _MaskedConv(MaskedLayer):
    """A convolution that takes its weight as an argument: its gradient belongs to nobody else."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the original
        return self._conv_forward(input, self._own_weight(), self.bias)  # type: ignore[operator]


class _MaskedLinear(MaskedLayer):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the original
        return F.linear(input, self._own_weight(), self.bias)  # type: ignore[arg-type]


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


def maskable_reason(module: nn.Module) -> str | None:
    """Why `module` cannot have a mask though it is a convolution, linear layer or attention; None when it can.

    Raises:
        TypeError: `module` is none of these.
    """
    if not is_maskable(module):
        raise TypeError(f"`{type(module).__name__}` is no convolution, linear layer or attention")
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    weight = module._parameters.get(name)
    if weight is None:
        return f"`{name}` is no parameter of its own (computed by a parametrization, or split over several)"
    if isinstance(weight, UninitializedParameter):
        return "its weight has no shape before the first call"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not a floating-point tensor"
    return None


def to_twin(module: nn.Module, mask: Tensor | None = None) -> MaskedLayer:
    """Turn `module` into its masked twin, in place, with all weights active unless `mask` is given."""
    kind = masked_class(type(module))
    module.__class__ = kind
    assert isinstance(module, MaskedLayer)
    weight = module.parameter
    module.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool) if mask is None else mask)
    module._settled = None
    module._collects = torch.zeros((), dtype=torch.bool, device=weight.device)
    LAYER_OF[id(weight)] = module
    return module


def to_plain(module: MaskedLayer) -> nn.Module:
    """Turn a masked twin back into the layer it stands for, in place, +0.0 outside its mask."""
    module.settle()
    if LAYER_OF.get(id(module.parameter)) is module:
        del LAYER_OF[id(module.parameter)]
    del module._buffers["mask"], module._settled, module._collects
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
