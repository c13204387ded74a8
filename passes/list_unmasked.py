"""List the weights that a model reads without a mask.

Masks belong to convolutions, linear layers and attentions. Whatever else a forward reads that has the shape of a matrix
is named, however it is changed on its way: bare parameters, the weights of recurrent layers, experts, tables, those
inside modules that were recorded whole. Embeddings that are looked up and norms are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx, nn

from growfx.masked.layers import MaskedLayer
from growfx.masked.twins import is_maskable, weight_name_of
from growfx.passes.record.recording import Recording

__all__ = ["list_unmasked"]

_MOVING = {
    "T", "bfloat16", "contiguous", "expand", "flatten", "float", "getattr", "getitem", "half", "mT", "permute",
    "reshape", "squeeze", "t", "to", "transpose", "type_as", "unflatten", "unsqueeze", "view",
}  # fmt: skip
_SEVERAL_WEIGHTS = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear, torch.jit.ScriptModule)


def list_unmasked(module: nn.Module, made: Recording, others: Iterable[MaskedLayer] = ()) -> dict[str, str]:
    """Weights without a mask -> why they have none.

    Args:
        module: the module that was recorded, its maskable layers being masked twins.
        made: its recording.
        others: masked layers that are not among its modules.
    """
    found: dict[str, str] = {}
    masked = {id(part.parameter) for part in (*module.modules(), *others) if isinstance(part, MaskedLayer)}
    for name in made.called:
        part = module.get_submodule(name)
        if isinstance(part, _SEVERAL_WEIGHTS):
            reason = f"a weight of `{type(part).__name__}`, which has several; masks belong to layers with one"
            found |= {f"{name}.{own}": reason for own in _matrices(part)}
    readers = {str(node.target): _reader(node) for node in made.graph.nodes if node.op == "get_attr"}
    for name, operator in made.used.items():
        parameter = module.get_parameter(name)
        if name in found or id(parameter) in masked or not _is_matrix(parameter):
            continue
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if is_maskable(owner) and leaf == weight_name_of(owner):  # listed as a layer
            continue
        by = operator or readers.get(name, "")
        found[name] = (
            f"a parameter used directly{f' by `{by}`' if by else ''}; masks belong to convolutions, linear layers and "
            "attentions"
        )
    return found


def _reader(node: fx.Node) -> str:
    """The first operator that does more with the parameter than move or cast it."""
    name = ""
    while node.users:
        node = next(iter(node.users))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name not in _MOVING:
            break
    return name


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether it has two dimensions or more, those of size one aside: a gain of shape (C, 1, 1) is a vector."""
    return sum(size > 1 for size in parameter.shape) > 1


def _matrices(part: nn.Module) -> Iterator[str]:
    return (name for name, parameter in part.named_parameters() if parameter.ndim > 1)
