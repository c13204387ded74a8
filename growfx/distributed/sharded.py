"""Weights sharded by rows over the ranks (`torch.distributed.fsdp.fully_shard`), and access to the local shard.

A sharded parameter is a DTensor, cut along dimension 0 as `torch.chunk` cuts: the last part may be shorter, or empty.
Masks are whole on every rank. In forward and backward the layer has the unsharded parameter, a plain one; in between,
when the optimizer steps and masks change, it has the DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from growfx.errors import ConfigError, TraceError

if TYPE_CHECKING:
    pass

__all__ = [
    "HOW_TO_GATHER",
    "all_finite",
    "check_cut",
    "check_recordable",
    "fsdp_modules",
    "is_sharded",
    "local_shard",
    "part_of",
    "require_whole",
    "reshard",
    "rows_a_rank",
    "with_local_shard",
]

HOW_TO_GATHER = (
    "gather them with `torch.distributed.checkpoint.state_dict.get_model_state_dict(net, "
    "options=StateDictOptions(full_state_dict=True))` and load that into a network wrapped anew"
)


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    if type(tensor) is nn.Parameter or type(tensor) is Tensor:
        return False
    # no tensor is one before its class is imported, which takes as long as a third of torch's own import
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def require_whole(tensor: Tensor, instead: str) -> None:
    """Raise `ConfigError` for a tensor that is spread over processes; `instead` says why, and what to do."""
    if is_sharded(tensor):
        raise ConfigError(
            f"a weight of shape {tuple(tensor.shape)} is spread over processes (`fully_shard` or another DTensor "
            f"plan), and {instead}"
        )


def check_cut(parameter: Any) -> None:
    """Raise `ConfigError` unless a sharded parameter is cut by rows into one part a rank, in the order of the ranks."""
    from torch.distributed.tensor import Shard

    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    ranks = torch.distributed.get_world_size()
    if placements != (Shard(0),) or mesh.mesh.tolist() != list(range(ranks)):
        raise ConfigError(
            f"a weight of shape {tuple(parameter.shape)} is spread as {placements} over a mesh of {mesh.shape} of the "
            f"{ranks} ranks; allowed is `fully_shard` over all ranks by rows: `init_device_mesh(device, ({ranks},))`, "
            "no `shard_placement_fn`, no further dimension that replicates or splits"
        )


def rows_a_rank(sharded: Any) -> int:
    """Rows in every part of a sharded tensor, but for those at the end, which have fewer or none."""
    return -(-sharded.shape[0] // sharded.device_mesh.size())


def local_shard(tensor: Tensor) -> Tensor:
    """Return the local shard: the rows on this rank, sharing memory, detached; all of an unsharded tensor."""
    found: Any = tensor.detach()
    with torch.no_grad():
        return found.to_local() if is_sharded(found) else found


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all values are finite on all ranks; each rank gets the same answer."""
    fine = all(bool(torch.isfinite(local_shard(tensor)).all()) for tensor in tensors)
    sharded: Any = next(filter(is_sharded, tensors), None)
    if sharded is None:
        return fine
    # Not left to the DTensor: some versions of torch look at the own part alone.
    flag = torch.tensor(int(fine), device=sharded.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=sharded.device_mesh.get_group())
    return bool(flag)


def part_of(whole: Tensor, sharded: Any) -> Tensor:
    """Return the rows of `whole` that belong to the local shard of `sharded`, a view; all where it is unsharded."""
    if not is_sharded(sharded):
        return whole
    rows = rows_a_rank(sharded)
    start = sharded.device_mesh.get_local_rank() * rows
    return whole[start : start + rows]


def with_local_shard(part: Tensor, sharded: Any) -> Tensor:
    """Return a tensor sharded like `sharded` whose local shard is `part`."""
    from torch.distributed.tensor import DTensor

    shape, stride = sharded.shape, sharded.stride()
    return DTensor.from_local(
        part, sharded.device_mesh, sharded.placements, run_check=False, shape=shape, stride=stride
    )


# -- networks -----------------------------------------------------------------------------------------------------


def fsdp_modules(net: nn.Module) -> list[Any]:
    """Return the modules of `net`, itself included, that `fully_shard` was called on."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in net.modules() if isinstance(module, fsdp.FSDPModule)]


def check_recordable(shell: nn.Module) -> None:
    """Raise `TraceError` where modules inside a network gather their own weights."""
    if fsdp_modules(shell):
        raise TraceError(
            "the network is recorded anew for inputs of another shape or dtype, which modules that gather their own "
            "weights (`fully_shard`) do not allow; call it once with such inputs before `fully_shard`"
        )


def reshard(net: nn.Module) -> None:
    """Give the layers their sharded parameters back: after a forward without backward they hold the whole ones."""
    for module in fsdp_modules(net):
        module.reshard()
