"""Name the weights that a model reads and that no mask belongs to.

Masks belong to convolutions, linear layers and attentions. Whatever else a forward reads that has the shape of a matrix
is named, however it is changed on its way: bare parameters, the weights of recurrent layers, experts, tables, those
inside modules that were recorded whole. Embeddings that are looked up and norms are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from growfx.layers import MaskedLayer
from growfx.passes.record import Recording

__all__ = ["list_unmasked"]

_SEVERAL_WEIGHTS = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


def list_unmasked(module: nn.Module, made: Recording) -> dict[str, str]:
    """Weights without a mask -> why they have none.

    Args:
        module: the module that was recorded, its maskable layers being masked twins.
        made: its recording.
    """
    found: dict[str, str] = {}
    masked = {id(part.parameter) for part in module.modules() if isinstance(part, MaskedLayer)}
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
        by = operator or readers.get(name, "")
        found[name] = (
            f"a parameter used directly{f' by `{by}`' if by else ''}; masks belong to convolutions, linear layers and "
            "attentions"
        )
    return found


def _reader(node: fx.Node) -> str:
    for user in node.users:
        return user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    return ""


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether it has two dimensions or more, those of size one aside: a gain of shape (C, 1, 1) is a vector."""
    return sum(size > 1 for size in parameter.shape) > 1


def _matrices(part: nn.Module) -> Iterator[str]:
    return (name for name, parameter in part.named_parameters(recurse=False) if parameter.ndim > 1)
