"""The native runtime in this process: compiled once for a source, and called through its C interface."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from growfx.errors import ArtifactError, ConfigError
from growfx.runtime.choice_cache import cache_folder
from growfx.runtime.native.sources import SOURCE_FOLDER

__all__ = ["MOST_THREADS", "ROW_BYTES", "NativeNetwork", "compile_library", "library_fingerprint", "library_status"]

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
_FLOATS = ctypes.POINTER(ctypes.c_float)
_MOST_AXES, _MESSAGE = 8, 512
ROW_BYTES = 1 << 30  # GROWFX_ROW_BYTES
MOST_THREADS = 256


def library_status() -> str:
    """Compile and load the library, the first time: "" when it is there, else the reason why it is not.

    `GROWFX_NO_KERNEL=1` in the environment switches it off, `CXX` names the compiler, and `GROWFX_CACHE` the folder
    that keeps what was built (by default one in the user's cache folder).
    """
    if os.environ.get("GROWFX_NO_KERNEL", "0") not in ("", "0"):
        return "switched off by `GROWFX_NO_KERNEL`"
    loaded = _load()
    return loaded if isinstance(loaded, str) else ""


def compile_library(target: Path, flags: Sequence[str] = FLAGS) -> str:
    """Compile the sources into one file; "" or the compiler's first complaint."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, *flags, *map(str, sorted(SOURCE_FOLDER.glob("*.cpp"))), "-o", str(target)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"no C++ compiler: `{command[0]}` cannot be run ({error.strerror})"
    if run.returncode == 0:
        return ""
    lines = [line.strip() for line in run.stderr.splitlines() if line.strip()] or ["no message"]
    return f"compiling failed: {next((line for line in lines if 'error' in line), lines[0])}"


@functools.cache
def _load() -> ctypes.CDLL | str:
    try:
        file = _folder() / "libgrowfx.so"
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                    made = Path(folder) / file.name
                    reason = compile_library(made)
                    if reason:
                        return reason
                    os.replace(made, file)
        return _declared(ctypes.CDLL(str(file)))
    except OSError as error:
        return f"the library cannot be kept or loaded ({error})"


def library_fingerprint() -> str:
    """Changes with everything that the compiled file depends on."""
    sources = b"\0".join(file.read_bytes() for file in sorted(SOURCE_FOLDER.glob("*.[chi]*")))
    facts = sources + repr((FLAGS, os.environ.get("CXX", "c++"))).encode()
    return hashlib.sha256(facts).hexdigest()[:16]


def _folder() -> Path:
    folder = cache_folder() / f"native_{library_fingerprint()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    net, text = ctypes.c_void_p, ctypes.c_char_p
    opened = [ctypes.POINTER(net), text, ctypes.c_size_t]
    library.growfx_open_bounded.argtypes = [text, ctypes.c_size_t, ctypes.c_int64, *opened]
    library.growfx_close.argtypes = [net]
    library.growfx_close.restype = None
    library.growfx_instructions.argtypes = [net]
    library.growfx_instructions.restype = text
    library.growfx_set_threads.argtypes = [net, ctypes.c_int, text, ctypes.c_size_t]
    pointers = ctypes.POINTER(_FLOATS)
    library.growfx_run.argtypes = [net, ctypes.c_int64, pointers, pointers, text, ctypes.c_size_t]
    for kind in ("input", "output"):
        getattr(library, f"growfx_{kind}_count").argtypes = [net]
        sizes = ctypes.POINTER(ctypes.c_int64)
        getattr(library, f"growfx_{kind}_shape").argtypes = [net, ctypes.c_int, ctypes.c_int64, sizes]
    return library


class NativeNetwork:
    """A network of the native runtime in this process.

    Args:
        data: the bytes of `network.gfx`.
        threads: to compute with.
        row_bytes: bytes of buffers that it may take for each row of a batch; what needs more is refused.

    Raises:
        ConfigError: there is no library (see `library_status`), or a number of threads that it does not take.
        ArtifactError: the bytes are not a network, damaged, of a newer version, or need more memory than allowed.
    """

    def __init__(self, data: bytes, threads: int = 1, row_bytes: int = ROW_BYTES) -> None:
        library = _load()
        if isinstance(library, str) or library_status():
            raise ConfigError(f"the native runtime is not available: {library_status()}")
        self._library, self._net = library, ctypes.c_void_p()
        error = ctypes.create_string_buffer(_MESSAGE)
        code = library.growfx_open_bounded(data, len(data), row_bytes, ctypes.byref(self._net), error, _MESSAGE)
        if code:
            raise ArtifactError(error.value.decode(errors="replace"))
        self._threads = 1
        self.set_threads(threads)

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from now on.

        Raises:
            ConfigError: a number of threads that it does not take, or that the system does not give.
        """
        if threads == self._threads:
            return
        error = ctypes.create_string_buffer(_MESSAGE)
        if self._library.growfx_set_threads(self._net, threads, error, _MESSAGE):
            raise ConfigError(error.value.decode(errors="replace"))
        self._threads = threads

    @property
    def instructions(self) -> str:
        """What its kernels use here: "avx512", "avx2" or "baseline"."""
        return self._library.growfx_instructions(self._net).decode()

    def input_shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Shapes of the inputs at a batch size."""
        return self._shapes("input", batch)

    def output_shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Shapes of the outputs at a batch size."""
        return self._shapes("output", batch)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs for float32 inputs on the CPU.

        Raises:
            ConfigError: inputs of other shapes or dtypes, or a batch that the network does not take.
        """
        batch = inputs[0].shape[0] if inputs and inputs[0].dim() else 0
        given = [tuple(x.shape) for x in inputs]
        if batch < 1 or given != self.input_shapes(batch) or any(x.dtype != torch.float32 for x in inputs):
            expected = self.input_shapes(max(batch, 1))
            kinds = ", ".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in inputs)) or "no"
            raise ConfigError(f"expected float32 inputs of shapes {expected}, got {kinds} inputs of shapes {given}")
        return self.run(batch, [x.detach().contiguous() for x in inputs])

    def run(self, batch: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for inputs that are known to be contiguous, float32 and of `input_shapes(batch)`.

        Raises:
            ConfigError: a batch that the network does not take.
        """
        shapes = self.output_shapes(batch)
        outputs = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes]
        error = ctypes.create_string_buffer(_MESSAGE)
        arrays = (_pointers(inputs), _pointers(outputs))
        if self._library.growfx_run(self._net, batch, *arrays, error, _MESSAGE):
            raise ConfigError(error.value.decode(errors="replace"))
        return outputs

    def _shapes(self, kind: str, batch: int) -> list[tuple[int, ...]]:
        count = getattr(self._library, f"growfx_{kind}_count")(self._net)
        shape_of = getattr(self._library, f"growfx_{kind}_shape")
        shapes: list[tuple[int, ...]] = []
        for index in range(count):
            sizes = (ctypes.c_int64 * _MOST_AXES)()
            rank = shape_of(self._net, index, batch, sizes)
            shapes.append(tuple(sizes[:rank]))
        return shapes

    def abandon(self) -> None:
        """Leave it as it is: in the child of a fork its threads are not there to be ended."""
        self._net = ctypes.c_void_p()

    def close(self) -> None:
        """Give its memory back; it cannot be called any more."""
        net, self._net = self._net, ctypes.c_void_p()
        self._library.growfx_close(net)

    def __del__(self) -> None:
        if getattr(self, "_net", None):
            self.close()


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (_FLOATS * len(tensors))(*(ctypes.cast(x.data_ptr(), _FLOATS) for x in tensors))
