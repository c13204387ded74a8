"""Processes that form a group on this machine: shared by the tests of many ranks."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

PATIENCE = 120  # seconds: a hang is a failure, a busy machine is none


def run_ranks(job: Callable[..., Any], count: int, *arguments: Any, launched: bool = False) -> list[Any]:
    """Run `job(*arguments)` in `count` processes and return what each returned, or the exception it ended with.

    They have a process group, or with `launched` only what torchrun would leave in their environment.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "growfx.training.start", "growfx.cli"])
    port = _free_port()
    pipes, processes = [], []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(job, arguments, rank, count, port, launched, sender))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    end = time.monotonic() + PATIENCE
    try:
        return [_result(pipe, rank, end) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(max(0.1, min(5.0, end - time.monotonic())))
            process.kill()
            process.join()


def _result(pipe: Any, rank: int, end: float) -> Any:
    if not pipe.poll(max(0.0, end - time.monotonic())):
        raise AssertionError(f"rank {rank} does not answer after {PATIENCE} s")
    try:
        return pipe.recv()
    except EOFError:
        return EOFError(f"rank {rank} ended without a word")


def _work(job: Any, arguments: Any, rank: int, count: int, port: int, launched: bool, sender: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        if not launched:
            dist.init_process_group("gloo")
        outcome = job(*arguments)
    except BaseException as error:  # whatever it is, the test is to see it
        outcome = error
        error.add_note(traceback.format_exc())
    try:
        sender.send(outcome)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def same(results: list[Any]) -> Any:
    """The result of every rank, which is the same one."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
        assert result == results[0]
    return results[0]
