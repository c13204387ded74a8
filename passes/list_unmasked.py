"""Name the weights that a recorded graph multiplies activations with and that no mask belongs to.

Masks belong to convolutions, linear layers and attentions. A recurrent layer holds several weights, and a model may
use a bare parameter as a matrix: neither is masked, and neither is left out in silence.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from growfx.layers import MaskedLayer

__all__ = ["list_unmasked"]

_SEVERAL_WEIGHTS = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
_CONTRACTING = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, torch.functional.einsum,
    torch.tensordot, torch.functional.tensordot, operator.matmul,
    "matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__", "__rmatmul__",
}  # fmt: skip
# How a parameter may be changed before it is used and still be that weight.
_KEEPING = {
    "transpose", "t", "permute", "reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "to",
    "type_as", "float", "half", "getattr", "expand", "repeat", "getitem", "mT", "T",
}  # fmt: skip


def list_unmasked(module: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """Weights without a mask -> why they have none.

    Args:
        module: the module the graph was recorded from, its maskable layers being masked twins.
        graph: the recorded graph; targets are names in `module`.
    """
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            part = module.get_submodule(str(node.target))
            if isinstance(part, _SEVERAL_WEIGHTS):
                reason = f"a weight of `{type(part).__name__}`, which has several; masks belong to layers with one"
                found |= {f"{node.target}.{name}": reason for name in _matrices(part)}
        elif node.op in ("call_function", "call_method") and node.target in _CONTRACTING:
            for source in node.all_input_nodes:
                name = _parameter(module, source)
                if name:
                    operator_name = getattr(node.target, "__name__", node.target)
                    found[name] = (
                        f"a parameter used as a matrix by `{operator_name}`; masks belong to convolutions, linear "
                        "layers and attentions"
                    )
    return found


def _matrices(part: nn.Module) -> Iterator[str]:
    return (name for name, parameter in part.named_parameters(recurse=False) if parameter.ndim > 1)


def _parameter(module: nn.Module, node: fx.Node) -> str:
    """The name of the bare parameter that the node holds, moved or cast; "" if it is anything else."""
    while node.op != "get_attr":
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op not in ("call_function", "call_method") or name not in _KEEPING:
            return ""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return ""
        node = first
    name = str(node.target)
    owner_name, _, last = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    parameter = owner._parameters.get(last)
    masked = isinstance(owner, MaskedLayer) and last == owner.weight_name
    return name if parameter is not None and parameter.ndim > 1 and not masked else ""
