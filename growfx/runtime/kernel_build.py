"""Libraries of C++ kernels: compiled once for a source, torch and processor, kept in torch's extension folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from growfx.quiet import ignored_warnings

__all__ = ["INFERENCE", "Library", "kernel_status"]


@dataclass(frozen=True)
class Library:
    """A library of kernels.

    Attributes:
        name: of its folder and file, before the fingerprint.
        sources: the files to compile, each by itself, those that take longest first.
        headers: growfx's own files that it includes.
    """

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]


SOURCE = Path(__file__).with_name("sparse_kernel.cpp")
HEADERS = [SOURCE.with_name("sparse_planes.h"), SOURCE.with_name("sparse_vectors.h")]
INFERENCE = Library("growfx_sparse", (SOURCE,), tuple(HEADERS))
# A product may be fused with its sum; nothing is reordered, so NaN and infinities keep their meaning.
FLAGS = ("-O3", "-fopenmp", "-ffp-contract=fast")
NATIVE = "-march=native"
OFF = "GROWFX_NO_KERNEL"
_ONE_THREAD = threading.Lock()


def kernel_status(library: Library = INFERENCE) -> str:
    """Loads a library, compiling it the first time: "" when it is there, else the reason why it is not.

    `GROWFX_NO_KERNEL=1` in the environment switches it off, `CXX` names the compiler (GCC or Clang), and
    `TORCH_EXTENSIONS_DIR` the folder that keeps what was built. Processes that start together compile once.
    """
    if os.environ.get(OFF, "0") not in ("", "0"):
        return f"switched off by `{OFF}`"
    with _ONE_THREAD:  # the others find what it found
        return _load(library)


@functools.cache
def _load(library: Library = INFERENCE) -> str:
    try:
        with _quiet():
            from torch.utils import cpp_extension

            name = f"{library.name}_{_fingerprint(library)}"
            root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
            folder = Path(root) / name
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "growfx.lock"):
                return _load_from(folder, name, library.sources)
    except ImportError as error:
        return f"`torch.utils.cpp_extension` cannot be imported: {error}"
    except OSError as error:
        return f"the folder of compiled extensions cannot be used: {error}"


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without what torch says about compilers it was not built with and about CUDA, which is not used here."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ignored_warnings():
            yield
    finally:
        logger.setLevel(level)


def _load_from(folder: Path, name: str, sources: tuple[Path, ...]) -> str:
    # Written last, so what an interrupted build left behind is built again.
    done = folder / "done"
    if done.exists():
        try:
            torch.ops.load_library(folder / f"{name}.so")
            return ""
        except OSError:
            done.unlink()
    compiler = os.environ.get("CXX", "c++")
    try:
        native = _accepts(compiler, NATIVE)
    except (OSError, ValueError) as error:
        return f"no C++ compiler: `{compiler}` cannot be run ({error})"
    reason = _build(folder, name, sources, [*FLAGS, NATIVE] if native else [*FLAGS])
    if not reason:
        done.touch()
    return reason


def _build(folder: Path, name: str, sources: tuple[Path, ...], flags: list[str]) -> str:
    from torch.utils import cpp_extension

    if not cpp_extension.is_ninja_available():
        return "compiling needs `ninja`, which is not installed: `pip install ninja`"
    # Older versions of torch wait forever for a lock that a killed process left; our own lock is held here.
    (folder / "lock").unlink(missing_ok=True)
    try:
        cpp_extension.load(
            name,
            [str(source) for source in sources],
            extra_cflags=flags,
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            is_python_module=False,
        )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"compiling failed: {_first_error(str(error))}"
    return ""


def _accepts(compiler: str, flag: str) -> bool:
    command = [*shlex.split(compiler), flag, "-fopenmp", "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _first_error(output: str) -> str:
    """The compiler's first complaint, or the first line where there is none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if "error:" in line), lines[0])


def _fingerprint(library: Library = INFERENCE) -> str:
    """Changes with everything that the compiled file depends on."""
    sources = [file.read_text() for file in (*library.sources, *library.headers)]
    facts = [*sources, *FLAGS, torch.__version__, os.environ.get("CXX", "c++"), _processor()]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` looks at: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
