"""What comes in at public functions: the masked network in what was handed over, or the error that says what to do."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from growfx.errors import ArtifactError, ConfigError, GrowfxError, TraceError
from growfx.masked.graph import MaskedGraph

__all__ = ["as_masked_graph", "is_masked_graph", "require_values"]

Network = TypeVar("Network", bound=nn.Module)

# Where something else than a network has its own class; elsewhere it is a wrong option.
_KINDS: dict[str, type[GrowfxError]] = {
    "growfx.save": ArtifactError,
    "growfx.unwrap": TraceError,
    "growfx.path_products": TraceError,
}


def as_masked_graph(net: Any, door: str) -> MaskedGraph:
    """The masked network that `net` is or holds: one that `torch.compile` or a data-parallel class was put around.

    Args:
        net: what was handed over.
        door: the public function as the user wrote it ("growfx.save"), for the error.

    Raises:
        ArtifactError: (`growfx.save`) it is something else.
        TraceError: (`growfx.unwrap`, `growfx.path_products`) likewise.
        ConfigError: (all others) likewise.
    """
    found = _inner(net)
    if isinstance(found, MaskedGraph):
        return found
    advice = "make one with growfx.wrap(model)" if isinstance(net, nn.Module) else "growfx.wrap makes one of a model"
    raise _KINDS.get(door, ConfigError)(f"{door} expects a growfx.MaskedGraph, got `{type(net).__name__}`; {advice}")


def require_values(net: Network, door: str) -> Network:
    """The network itself, whose weights and buffers have values.

    Raises:
        ArtifactError, TraceError, ConfigError: as `as_masked_graph`, where one is on the meta device.
    """
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_meta:
            raise _KINDS.get(door, ConfigError)(
                f"{door} expects a network with values, and `{name}` is on the meta device, which has none; build the "
                "model on a device, or load a state dict first: `net.load_state_dict(state, assign=True)`"
            )
    return net


def is_masked_graph(net: Any) -> bool:
    """Whether `as_masked_graph` finds one."""
    return isinstance(_inner(net), MaskedGraph)


def _inner(net: Any) -> Any:
    # Asking torch for its compiler would import it; where it was not imported nothing was compiled.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    while True:
        if compiler is not None and isinstance(net, compiler.OptimizedModule):
            net = net._orig_mod
        elif isinstance(net, (DataParallel, DistributedDataParallel)):
            net = net.module
        else:
            return net
