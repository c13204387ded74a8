"""Values of present edges on several ranks: `DistributedDataParallel` with them, `fully_shard` refused."""

import dataclasses
from typing import Any

import pytest
import torch
from rank_processes import run_ranks, same
from test_rank_runs import METHODS, rank_loaders
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_nets import QUICK, fresh_net

import growfx
from growfx.errors import ConfigError
from growfx.runs.checkpoint import content_digest

pytestmark = pytest.mark.slow


def run(storage: str, name: str) -> tuple[str, str]:
    net, method = fresh_net(), growfx.methods.create(name, **METHODS[name])
    options = dataclasses.replace(QUICK, storage=storage)
    growfx.train(net, *rank_loaders(), method=method, options=options, progress=False)
    return net.mask_digest(), content_digest(dict(net.state_dict()))


def both_storages() -> dict[str, Any]:
    return {name: [run(storage, name) for storage in ("present", "dense")] for name in ("rigl", "pwmpr", "snip")}


def refused(call: Any) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return "nothing was refused"


def loops_of_ones_own() -> dict[str, str]:
    images = torch.randn(4, 1, 8, 8)
    net = growfx.use_kernels(fresh_net(), "dense", storage="present")
    replica = DistributedDataParallel(net)
    replica(images).sum().backward()
    net.set_masks({"conv2": torch.rand(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5})
    found = {"stale": refused(lambda: replica(images))}
    DistributedDataParallel(net)(images).sum().backward()
    spread = growfx.use_kernels(fresh_net(), "dense", storage="present")
    fully_shard(spread, mesh=init_device_mesh("cpu", (2,)))
    found["fully_shard after"] = refused(lambda: spread(images))
    other = fresh_net()
    fully_shard(other, mesh=init_device_mesh("cpu", (2,)))
    found["fully_shard before"] = refused(lambda: growfx.use_kernels(other, "dense", storage="present"))
    return found


def test_ranks_end_with_the_same_bits_as_on_whole_weights():
    for name, (present, dense) in same(run_ranks(both_storages, 2)).items():
        assert present[0] == dense[0], name
        assert present[1] == dense[1], name


def test_what_ranks_cannot_follow_is_refused_with_the_reason():
    found = same(run_ranks(loops_of_ones_own, 2))
    assert "new `DistributedDataParallel`" in found["stale"]
    assert "`fully_shard`" in found["fully_shard after"]
    assert "`fully_shard`" in found["fully_shard before"]
