"""The files that a call passes, in order: from `growfx.train` to a finished round, from `growfx.load` to a module.

    python benchmarks/ways.py [--list]

A reader who follows the call opens these files. A function counts once, at its first call, as nobody reads it twice; a
change is a step from a function in one file to one in another. `--list` prints the files.
"""

import argparse
import inspect
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import growfx

ROOTS = tuple(str(Path(folder).resolve()) for folder in (Path(growfx.__file__).parent, *growfx.passes.__path__))


class Done(Exception):  # noqa: N818 - the end of a way
    """The call has come to where the way ends."""


def way(work: Callable[[], Any], last: str | None = None) -> list[str]:
    """Files of the functions that `work` calls, in the order of their first calls, up to the return of `last`."""
    seen: set[Any] = set()
    files: list[str] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "return" and code.co_name == last:
            raise Done
        in_function = code.co_flags & inspect.CO_OPTIMIZED  # not the body of a class or module that is being imported
        if event != "call" or not in_function or code in seen or code.co_name.startswith("<"):
            return
        file = str(Path(code.co_filename).resolve())
        if file.startswith(ROOTS):
            seen.add(code)
            files.append(str(Path(file).relative_to(Path(ROOTS[0]).parent)))

    sys.setprofile(watch)
    try:
        work()
    except Done:
        pass
    finally:
        sys.setprofile(None)
    return [file for file, _ in itertools.groupby(files)]


def network() -> nn.Sequential:
    """A small convolutional network."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )


def ways(folder: Path) -> dict[str, list[str]]:
    """The files of each way."""
    images, classes = torch.randn(32, 1, 8, 8), torch.randint(4, (32,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, classes), batch_size=16)
    net = growfx.wrap(network(), images[:1])
    method = growfx.methods.create("pwmpr", epochs_per_round=1, max_density=0.3)
    growfx.save(growfx.wrap(network(), images[:1], density=0.2), folder / "artifact")
    model = network()
    return {
        "growfx.train to a finished round": way(
            lambda: growfx.train(net, loader, loader, method=method, epochs=1, progress=False), last="report"
        ),
        "growfx.load to a module": way(lambda: growfx.load(folder / "artifact", model=model)),
    }


def main() -> None:
    """Print each way's number of changes of file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, files in ways(Path(folder)).items():
            print(f"{name}: {len(files) - 1} changes of file, {len(set(files))} files")
            if arguments.list:
                print("".join(f"  {file}\n" for file in files), end="")


if __name__ == "__main__":
    main()
