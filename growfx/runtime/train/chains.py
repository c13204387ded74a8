"""Which norms of a network are followed by a sum or a rectification that can be computed with them, by its graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["ADDITIONS", "RECTIFICATIONS", "Chain", "chains_of"]

RECTIFICATIONS: set[Any] = {F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_}
ADDITIONS: set[Any] = {
    *(operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_),
    *(torch.Tensor.__add__, torch.Tensor.__iadd__, torch.Tensor.__radd__),
}
_METHODS = {"relu": "relu", "relu_": "relu", "add": "add", "add_": "add"}


@dataclass(frozen=True)
class Chain:
    """What follows a norm, each the only use of what came before.

    Attributes:
        adds: a sum with another branch.
        rectifies: a rectification, after the sum where there is one.
    """

    adds: bool
    rectifies: bool


def chains_of(graph: fx.Graph, root: nn.Module) -> dict[str, Chain]:
    """The chains of batch norms of `root` whose recorded `graph` shows one; by name of the norm.

    A norm that is called several times has the chain that all its calls have. Of two norms that are added up, only the
    first waits for the sum.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    found: dict[str, Chain | None] = {}
    waiting: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules.get(str(node.target)), _BatchNorm):
            continue
        name = str(node.target)
        chain = _chain_after(node, modules, waiting)
        found[name] = chain if found.get(name, chain) == chain else None
    return {name: chain for name, chain in found.items() if chain is not None}


def _chain_after(node: fx.Node, modules: dict[str, nn.Module], waiting: set[fx.Node]) -> Chain | None:
    after = _only_user(node, modules)
    if after is None:
        return None
    kind = _kind(after, modules)
    if kind == "relu":
        return Chain(adds=False, rectifies=True)
    if kind != "add" or after in waiting:
        return None
    waiting.add(after)
    last = _only_user(after, modules)
    return Chain(adds=True, rectifies=last is not None and _kind(last, modules) == "relu")


def _only_user(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The one node that uses `node`, past identities."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_module" or type(modules.get(str(user.target))) is not nn.Identity:
            return user
        node = user
    return None


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """ "relu", "add" or "" for anything else."""
    if node.op == "call_module":
        return "relu" if type(modules.get(str(node.target))) is nn.ReLU else ""
    if node.op == "call_method":
        kind = _METHODS.get(str(node.target), "")
    else:
        kind = "relu" if node.target in RECTIFICATIONS else "add" if node.target in ADDITIONS else ""
    if kind == "add":
        nodes = [value for value in node.args if isinstance(value, fx.Node)]
        return "add" if len(node.args) == len(set(nodes)) == 2 and not node.kwargs else ""
    return kind
