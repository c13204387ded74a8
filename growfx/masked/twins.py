"""Masked twins: the classes that layers of a model become when they get a mask.

A twin is a subclass of the layer it stands for (`MaskedConv2d(MaskedLayer, nn.Conv2d)`), made on demand for any
convolution, linear layer or multi-head attention and for any subclass of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from growfx.masked.layers import MaskedLayer
from growfx.masked.registry import LAYER_OF
from growfx.masked.stored import Stored
from growfx.masked.weight_reads import WeightRead

__all__ = [
    "has_names_of_a_twin",
    "is_maskable",
    "maskable_reason",
    "masked_class",
    "masks_by_parameter",
    "to_plain",
    "to_twin",
    "weight_name_of",
]

# Convolutions that do not say so by their base class; named, so that nothing has to be imported.
_CONVOLUTIONS = {"timm.layers.cond_conv2d.CondConv2d"}


class _Twin(MaskedLayer):
    """A masked layer that is found again by the class it stands for, which makes it picklable."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty_twin, (self.twin_of,), {**self.__dict__, **self.state_of_a_copy()}


class _MaskedConv(_Twin):
    """A convolution that takes its weight as an argument: its gradient belongs to nobody else."""

    calls_kernel = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the original
        if self.kernel is not None and not torch.compiler.is_compiling():
            output = self.kernel(self, input)
            if output is not None:
                return output
        weight = self._weight(own=True)
        with self._built_anew(weight):
            return self._conv_forward(input, weight, self.bias)  # type: ignore[operator]


class _MaskedLinear(_Twin):
    calls_kernel = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the original
        if self.kernel is not None and not torch.compiler.is_compiling():
            output = self.kernel(self, input)
            if output is not None:
                return output
        weight = self._weight(own=True)
        with self._built_anew(weight):
            return F.linear(input, weight, self.bias)  # type: ignore[arg-type]


class _MaskedAttention(_Twin):
    """Multi-head attention: the mask belongs to the joint input projection; the output projection is a layer itself."""

    weight_name = "in_proj_weight"

    @property
    def weight(self) -> nn.Parameter:
        """The joint projection of queries, keys and values: shape (3 embed_dim, embed_dim)."""
        return cast(nn.Parameter, self.weight_for_reader(self.parameter))

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
            base = _Twin
        members = {
            "twin_of": original,
            base.weight_name: WeightRead(base.weight_name),
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


def masks_by_parameter(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks by the name of the parameter they belong to, on the CPU.

    Args:
        model: a plain model.
        masks: by the name of a layer, or of a parameter that belongs to no layer growfx knows.
    """
    modules = dict(model.named_modules())
    return {
        f"{name}.{weight_name_of(modules[name])}" if name in modules else name: mask.cpu()
        for name, mask in masks.items()
    }


def maskable_reason(module: nn.Module) -> str | None:
    """Why `module` cannot have a mask though it is a convolution, linear layer or attention; None when it can.

    Raises:
        TypeError: `module` is none of these.
    """
    if not is_maskable(module):
        raise TypeError(f"`{type(module).__name__}` is not a convolution, linear layer or attention")
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
    if not weight.numel():
        return "its weight has no elements"
    return None


def has_names_of_a_twin(module: nn.Module) -> bool:
    """Whether a layer has a `mask`, or another attribute of a masked twin, that becoming one would hide."""
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
    module._stored = Stored(weight, module.mask)
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
    for name in ("read_directly", "sharded", "dense_gradient", "gate", "kernel", "_collecting", "_lent", "present"):
        module.__dict__.pop(name, None)
    original: Any = module.twin_of
    module.__class__ = original
    return module
