"""Join a process group started by torchrun: `torchrun -m growfx grow ...`.

torchrun sets the rank in environment variables. torch is imported only when it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from growfx.errors import ConfigError, GrowfxError, one_line

if TYPE_CHECKING:
    import torch

__all__ = ["RankError", "launched", "process_group", "speaks"]

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FAILURE = "growfx failure"  # key of the first failure, in the store that the ranks share


class RankError(GrowfxError):
    """A run of several ranks failed.

    `first`: whether this rank failed before the others, and so prints the message.
    """

    def __init__(self, message: str, first: bool = True) -> None:
        super().__init__(message)
        self.first = first


def launched() -> bool:
    """Whether torchrun (or its like) started this process as one of several."""
    return all(name in os.environ for name in _ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


def speaks() -> bool:
    """Whether this process prints: true on rank 0 and outside a process group."""
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def process_group(device: str = "auto") -> Generator[None]:
    """Join the process group that torchrun started, and leave it at the end, also after an error.

    Tensors on the CPU travel by gloo, those of an accelerator by its own backend (nccl for CUDA); each process of a
    machine takes the accelerator of its local number. Not started by torchrun, or alone: nothing is done.

    Args:
        device: as in `TrainOptions`.

    Raises:
        RankError: in place of a `GrowfxError`; and of any error, where another rank failed first.
    """
    if not launched():
        yield
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    store.set_timeout(dist.default_pg_timeout)
    failures = dist.PrefixStore("growfx", store)  # pyright: ignore[reportPrivateImportUsage]
    try:
        dist.init_process_group(_backend(device), store=store, rank=rank, world_size=size)
        yield
    except Exception as error:
        first = _first_failure(failures, rank, error)
        if first is not None:
            raise RankError(first, first=False) from error
        if isinstance(error, GrowfxError):
            raise RankError(one_line(error) + (f" (rank {rank})" if rank else ""), first=True) from error
        if _is_lost_connection(error):
            raise RankError(
                f"rank {rank} lost the connection to another rank, which ended without a word (killed, or out of "
                f"memory?): {one_line(error)[:200]}",
                first=True,
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _backend(device: str) -> str:
    """What `init_process_group` is to use; the accelerator of this process becomes the current one."""
    import torch
    import torch.distributed as dist

    kind = _kind(device)
    if kind.type == "cpu":
        return "cpu:gloo"
    local, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
    if local >= count:
        raise ConfigError(
            f"process {local} of this machine needs an accelerator per process, got {count}; start "
            f"`--nproc-per-node {count}`, or train on the CPU with `--set device=cpu`"
        )
    torch.accelerator.set_device_index(local)
    return f"cpu:gloo,{kind.type}:{dist.get_default_backend_for_device(kind.type)}"


def _kind(device: str) -> torch.device:
    import torch

    if device != "auto":
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def _first_failure(store: Any, rank: int, error: Exception) -> str | None:
    """Tell the other ranks of this failure; returns theirs where one came first."""
    own = f"rank {rank}: {one_line(error)}"
    try:
        found = store.compare_set(_FAILURE, "", own).decode()
    except RuntimeError:  # the process that keeps the store has ended: not without a word
        return "rank 0 ended"
    return None if found == own else found


def _is_lost_connection(error: Exception) -> bool:
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
