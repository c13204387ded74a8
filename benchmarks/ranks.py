"""What a mask update costs among several ranks: bytes sent, memory and time; and the formulas of `docs/scale.md`.

Every rank is a process of this machine with one thread, joined by gloo. Bytes are those of the tensors given to
collectives, of one rank. Memory is the peak of the resident set above its level before; blocks are given back at once
(`MALLOC_MMAP_THRESHOLD_`), so that it counts what is alive. Ranks share the cores: times say what a round costs here
beside a step, not how it scales.

    python benchmarks/ranks.py [--model resnet34] [--size 64] [--batch 4] [--ranks 1 2 4] [--shards] [--json FILE]

With `--shards` each rank has a part of the weights (`fully_shard`) in place of all of them (`DistributedDataParallel`).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

METHODS: dict[str, dict[str, Any]] = {
    "pwmpr": {"seed_density": 0.1, "epochs_per_round": 1},
    "gradient-growth": {"seed_density": 0.1, "epochs_per_round": 1},
    "rigl": {"density": 0.1, "update_every": 2, "update_until": 1.0},
    "gmp": {"density": 0.1, "update_every": 2},
}
WITH_SHARDS = ("rigl", "gmp", "gradient-growth")
WITHOUT = ("pwmpr", "gradient-growth", "rigl")


def resident(field: str) -> int:
    """Bytes of this process in memory now (`VmRSS`) or at most since the last reset (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Bytes, memory and seconds of `work`; nested tensors of collectives count each."""
    from torch import Tensor
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    class Traffic(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                # the first argument is what a rank gives, or what it receives from all
                given = [value for value in pytree.tree_leaves(args[0]) if isinstance(value, Tensor)]
                sent[func._schema.name.removeprefix("c10d::")] += sum(value.nbytes for value in given)
            return func(*args, **(kwargs or {}))

    sent: Counter[str] = Counter()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.perf_counter()
    with Traffic():
        work()
    seconds = time.perf_counter() - start
    return {"bytes": dict(sent), "memory": resident("VmHWM") - before, "seconds": seconds}


def one_method(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A step without and with what a method does after it, once warm."""
    import timm
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel

    import growfx
    from growfx.distributed import ranks

    torch.manual_seed(0)
    net = growfx.wrap(timm.create_model(arguments.model), torch.randn(1, 3, arguments.size, arguments.size))
    model: Any = net
    if arguments.shards:
        fully_shard(net, mesh=init_device_mesh("cpu", (ranks.world_size(),)))
    elif ranks.world_size() > 1:
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    method = growfx.methods.create(name, **METHODS[name])
    method.attach(net, optimizer, total_steps=100, steps_per_epoch=2)
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    targets = torch.arange(arguments.batch)
    listens = name.endswith(("pwmpr", "growth"))

    def step() -> None:
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()

    def update() -> None:
        changed = method.step()
        if listens:
            method.report(0.5 + 0.01 * len(method.trace))
        assert changed or net.nnz != before

    found: dict[str, Any] = {}
    for _ in range(2):  # the first round also records, and learns which layers are on a path
        optimizer.zero_grad()
        step()
        method.step()
        optimizer.zero_grad()
        before = net.nnz
        found = {"step": measured(step), "update": measured(update)}
    buffers = [value for key, value in net.named_buffers() if not key.endswith(".mask")]
    return found | {
        "weights": net.numel,
        "parameters": sum(value.numel() for value in net.parameters()),
        "layers": len(net.layers),
        "name_bytes": sum(len(layer) for layer in net.layers),
        "nnz_before": before,
        "nnz": net.nnz,
        "buffer_bytes": sum(value.nbytes for value in buffers),
        "resting": resting(net, optimizer),
    }


def resting(net: Any, optimizer: Any) -> dict[str, int]:
    """Bytes of what a rank keeps between steps."""
    from growfx.distributed.sharded import local_shard

    layers = net.layers.values()
    state = [value for entry in optimizer.state.values() for value in entry.values() if value is not None]
    return {
        "parameters": sum(local_shard(value).nbytes for value in net.parameters()),
        "gradients": sum(local_shard(value.grad).nbytes for value in net.parameters() if value.grad is not None),
        "masks": sum(layer.mask.nbytes for layer in layers),
        "optimizer": sum(local_shard(value).nbytes for value in state),
    }


def work(rank: int, count: int, store: str, arguments: argparse.Namespace, out: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    found = {name: one_method(name, arguments) for name in (WITH_SHARDS if arguments.shards else WITHOUT)}
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shards", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.update({"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"})
    import torch.multiprocessing
    from machine import describe

    results = []
    for count in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            given = (count, str(Path(folder) / "store"), arguments, str(out))
            torch.multiprocessing.spawn(work, given, nprocs=count)
            results += [{"ranks": count, "method": k, **v} for k, v in json.loads(out.read_text()).items()]
    rows = []
    for entry in results:
        sizes = [sum(entry[part]["bytes"].values()) for part in ("step", "update")]
        memory = entry["update"]["memory"] / entry["weights"]
        rows.append(
            [entry["ranks"], entry["method"], *sizes, memory, entry["step"]["seconds"], entry["update"]["seconds"]]
        )
    heads = ["ranks", "method", "bytes/step", "bytes/update", "memory B/weight", "step s", "update s"]
    print(tabulate(rows, heads, floatfmt=".2f", intfmt=","))
    if arguments.json:
        facts = {"machine": describe(), "options": {"model": arguments.model, "size": arguments.size}}
        facts["options"] |= {"batch": arguments.batch, "threads": 1, "shards": arguments.shards}
        arguments.json.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
