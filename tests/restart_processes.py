"""Runs in processes of their own, which tests end as an operating system would."""

import multiprocessing
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


@contextmanager
def process_of(job: Callable[..., Any], *arguments: Any) -> Generator[BaseProcess]:
    """A process that runs `job(*arguments)`, killed at the end of the `with` block if it is still there.

    It is forked from one that has imported everything and done nothing, so that starting it takes no time.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "growfx.training.start", "growfx.cli"])
    process = context.Process(target=_alone, args=(job, arguments), daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(60)


def _alone(job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    job(*arguments)


def command_line(errors: Path, *arguments: object) -> None:
    """`growfx ARGUMENTS`, with what it says written to the file `errors`."""
    from growfx.cli import main

    with errors.open("w") as sys.stderr:
        main([str(a) for a in arguments])
