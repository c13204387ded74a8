"""Processes that train one network together: who they are, and what they tell each other.

Each of them (a rank) has the whole network and other images. `torch.distributed` carries what is said; without an
initialised process group there is one rank, and nothing here does anything. Every function is called by all ranks, in
the same order, or by none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from growfx.errors import ConfigError, GrowfxError, MaskError
from growfx.masked.layers import MaskedLayer
from growfx.masked.mask_bits import pack

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = [
    "average",
    "average_float",
    "everyone",
    "finite",
    "from_first",
    "gather",
    "is_sharded",
    "is_shared",
    "largest",
    "on_first",
    "rank",
    "replicate",
    "require_same_masks",
    "share_buffers",
    "total",
    "within_ddp",
    "world_size",
]

_T = TypeVar("_T")
_SHOWN = 6  # layers named in an error
_made: dict[str, Any] = {}  # the group of `_cpu_group`, and the ranks it was made for


def world_size() -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def is_shared(net: MaskedGraph) -> bool:
    """Whether several ranks train `net` together: it is in `DistributedDataParallel`, or `fully_shard` spread it."""
    return (net.replicated or net.sharded) and world_size() > 1


def within_ddp() -> bool:
    """Whether the forward under way is one of `DistributedDataParallel`.

    Raises:
        ConfigError: one that other ranks may drop out of (`model.join()`).
    """
    replica = DistributedDataParallel._active_ddp_module
    if replica is None:
        return False
    if replica._join_config.enable and world_size() > 1:
        raise ConfigError(
            "the network trains within `join()`, where ranks end after different numbers of steps; masks are changed "
            "and compared by all ranks together, so let all make as many steps (`DistributedSampler` shares images "
            "out evenly; else stop at the smallest number of batches)"
        )
    return True


def _cpu_group() -> dist.ProcessGroup | None:
    """The group by which tensors on the CPU travel: the ranks' own where it can, else one made for it once."""
    world = dist.group.WORLD
    if "cpu:" in dist.get_backend_config(world):
        return world
    if _made.get("world") is not world:
        _made.update(world=world, group=dist.new_group(backend="gloo"))
    return _made["group"]


# -- objects ------------------------------------------------------------------------------------------------------


def everyone(value: _T) -> list[_T]:
    """Return the value of every rank, in the order of the ranks. Values are pickled."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=_cpu_group())
    return found


def from_first(work: Callable[[], _T]) -> _T:
    """Let rank 0 alone do `work`, and return its result on every rank; a `GrowfxError` of it is raised on all."""
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    problem: Exception | None = None
    if rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            problem = error
            known = isinstance(error, GrowfxError)
            outcome[1] = error if known else GrowfxError(f"rank 0 failed: {type(error).__name__}: {error}")
    dist.broadcast_object_list(outcome, src=0, group=_cpu_group())
    if problem is not None:
        raise problem
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_first(work: Callable[[], _T]) -> _T | None:
    """Let rank 0 alone do `work` and have its result, the others None; a `GrowfxError` of it is raised on all."""
    kept: list[_T] = []

    def keep() -> None:
        kept.append(work())

    from_first(keep)
    return kept[0] if kept else None


# -- numbers ------------------------------------------------------------------------------------------------------


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, the same bits on each. Shapes and dtypes agree between ranks."""
    count = world_size()
    if count == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor.div_(count)


def average_float(value: float) -> float:
    """Return the mean of a number over the ranks, added in the order of the ranks: the same bits on each."""
    values = everyone(value)
    return value if len(values) == 1 else sum(values) / len(values)


def largest(*values: int) -> list[int]:
    """Return the largest that any rank gives, of each of the `values`.

    It is cheap enough to be asked after each step: without a process group nothing happens, and with one no rank waits
    for its accelerator.
    """
    if world_size() == 1:
        return list(values)
    numbers = torch.tensor(values)
    dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_cpu_group())
    return numbers.tolist()


def total(counts: Tensor) -> Tensor:
    """Return the sum of whole numbers over the ranks, of each. Shapes agree between ranks."""
    if world_size() == 1:
        return counts
    summed = counts.cpu().clone()
    dist.all_reduce(summed, group=_cpu_group())
    return summed


def gather(values: Tensor) -> Tensor:
    """Return the values of every rank, one row a rank, in their order. Shapes agree between ranks."""
    if world_size() == 1:
        return values[None]
    found = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(found, values.contiguous(), group=_cpu_group())
    return torch.stack(found)


def finite(value: Tensor) -> bool:
    """Whether a scalar is finite on every rank."""
    mean = value.detach().clone()
    average([mean])
    return bool(torch.isfinite(mean))


# -- networks -----------------------------------------------------------------------------------------------------


def replicate(net: MaskedGraph) -> DistributedDataParallel:
    """Return `net` in `DistributedDataParallel`, which sends rank 0's weights and buffers to all."""
    from growfx.masked.trial import unused_parameters

    unused = bool(unused_parameters(net))
    # gradients need no copy of their own beside what is sent
    return DistributedDataParallel(net, find_unused_parameters=unused, gradient_as_bucket_view=True)


def is_sharded(sampler: object) -> bool:
    """Whether a loader's sampler shares the images out among the ranks: every rank takes each n-th."""
    from timm.data.distributed_sampler import OrderedDistributedSampler

    return isinstance(sampler, DistributedSampler | OrderedDistributedSampler)


def share_buffers(net: nn.Module) -> None:
    """Give every rank the buffers of rank 0, masks aside, as `DistributedDataParallel` does before each forward.

    In between each rank has norm statistics of its own, which must not decide anything.
    """
    masks = {id(module.mask) for module in net.modules() if isinstance(module, MaskedLayer)}
    for buffer in net.buffers():
        if id(buffer) not in masks:
            dist.broadcast(buffer, src=0)


def require_same_masks(net: MaskedGraph) -> None:
    """Compare the masks of all ranks, by digest.

    Raises:
        MaskError: on every rank, where they differ; names the layers.
    """
    digests = everyone({name: _digest(layer) for name, layer in net.layers.items()})
    first = digests[0]
    others = [number for number, found in enumerate(digests) if found != first]
    if not others:
        return
    layers = [name for name in first if any(found.get(name) != first[name] for found in digests)]
    raise MaskError(
        f"the masks of {_listed(layers)} differ between ranks: rank {_numbers(others)} against rank 0; every rank "
        "needs the same model, seed and options, weights loaded before `DistributedDataParallel` or `fully_shard` "
        "takes the network, and no change of weights or masks of its own"
    )


def _digest(layer: MaskedLayer) -> bytes:
    return hashlib.sha256(pack(layer.mask).numpy().tobytes()).digest()


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more layers" if len(names) > _SHOWN else "")


def _numbers(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    return shown + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")
