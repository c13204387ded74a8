"""A masked network that several ranks train together."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from growfx.distributed import ranks
from growfx.distributed.sharded import fsdp_modules, require_whole
from growfx.masked.graph import MaskedGraph

__all__ = ["is_shared", "unsharded"]


def is_shared(net: MaskedGraph) -> bool:
    """Whether several ranks train `net` together: it is in `DistributedDataParallel`, or `fully_shard` spread it."""
    return (net.replicated or net.sharded) and ranks.world_size() > 1


@contextmanager
def unsharded(net: MaskedGraph) -> Generator[None]:
    """Gather the weights of all layers, as a forward does, for work that needs them whole; changes are not kept.

    Raises:
        ConfigError: they are gathered by a module around the network.
    """
    modules = fsdp_modules(net)
    for module in modules:
        module.unshard()
    try:
        for layer in net.layers.values():
            require_whole(layer.parameter, "a module around the network gathers it; call `fully_shard` on the network")
        yield
    finally:
        for module in modules:
            module.reshard()
