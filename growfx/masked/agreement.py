"""What ranks that train one network together must agree on: the same masks, the same buffers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import nn

from growfx.distributed import ranks
from growfx.errors import MaskError
from growfx.masked.layers import MaskedLayer
from growfx.masked.mask_bits import pack

__all__ = ["require_same_masks", "share_buffers"]

_SHOWN = 6  # layers named in an error


def share_buffers(net: nn.Module) -> None:
    """Give every rank the buffers of rank 0, masks aside, as `DistributedDataParallel` does before each forward.

    In between each rank has its own norm statistics, which must not decide anything.
    """
    masks = {id(module.mask) for module in net.modules() if isinstance(module, MaskedLayer)}
    for buffer in net.buffers():
        if id(buffer) not in masks:
            dist.broadcast(buffer, src=0)


def require_same_masks(layers: Mapping[str, MaskedLayer]) -> None:
    """Compare the masks of all ranks, by digest.

    Raises:
        MaskError: on every rank, where they differ; names the layers.
    """
    digests = ranks.everyone({name: _digest(layer) for name, layer in layers.items()})
    first = digests[0]
    others = [number for number, found in enumerate(digests) if found != first]
    if not others:
        return
    named = [name for name in first if any(found.get(name) != first[name] for found in digests)]
    raise MaskError(
        f"the masks of {_listed(named)} differ between ranks: rank {_numbers(others)} against rank 0; every rank "
        "needs the same model, seed and options, weights loaded before `DistributedDataParallel` or `fully_shard` "
        "takes the network, and no change of weights or masks"
    )


def _digest(layer: MaskedLayer) -> bytes:
    return hashlib.sha256(pack(layer.mask).numpy().tobytes()).digest()


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more layers" if len(names) > _SHOWN else "")


def _numbers(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return shown + (f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else "")
