"""Rank, world size and collective operations of distributed training.

Each process (a rank) has the whole network and its part of the images; they communicate through `torch.distributed`.
Without an initialised process group there is one rank, and these functions are no-ops. Every function is collective:
all ranks call it, in the same order, or none does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from growfx.errors import ConfigError, GrowfxError

__all__ = [
    "average",
    "average_float",
    "everyone",
    "exchange",
    "finite",
    "from_first",
    "gather",
    "largest",
    "on_first",
    "rank",
    "total",
    "within_ddp",
    "world_size",
]

_T = TypeVar("_T")
_made: dict[str, Any] = {}  # the group of `_cpu_group`, and the ranks it was made for


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this rank, from 0; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def exchange() -> bool | None:
    """Whether `DistributedDataParallel`, in whose forward this is, will average the gradients of the backward pass.

    False within `no_sync()`; None in the forward of a network that it does not hold.
    """
    replica = DistributedDataParallel._active_ddp_module
    return None if replica is None else bool(replica.require_backward_grad_sync)


def within_ddp() -> bool:
    """Whether the running forward is called by `DistributedDataParallel`.

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
