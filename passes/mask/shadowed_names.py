"""Names of a model that its net has for something else."""

from __future__ import annotations

from torch import fx, nn

from growfx.masked.graph import MaskedGraph

__all__ = ["shadowed_names"]


def shadowed_names(net: MaskedGraph) -> list[str]:
    """Public attributes and methods of the model that on the net are the net's own, sorted.

    The model's forward and methods see the model's. Left out are those that are None, and submodules: the net's
    `layers` and `graph` are another kind of thing, and `get_submodule` gives the model's.
    """
    shell = net.shell
    names = {name for name in {*vars(net), *_names_of_class(net)} if not name.startswith("_")}
    if isinstance(shell, fx.GraphModule):
        names -= {*dir(fx.GraphModule), "meta"}
    names.discard("training")  # one flag for both
    theirs = {*vars(shell), *shell._parameters, *shell._buffers, *_names_of_class(shell)} - {*shell._modules}
    return sorted(name for name in names & theirs if not _is_none(shell, name))


def _names_of_class(module: nn.Module) -> set[str]:
    found = {name for kind in type(module).__mro__ if kind not in nn.Module.__mro__ for name in vars(kind)}
    return found - set(dir(nn.Module))


def _is_none(module: nn.Module, name: str) -> bool:
    if isinstance(getattr(type(module), name, None), property):  # not to be computed only for this
        return False
    return getattr(module, name, None) is None
