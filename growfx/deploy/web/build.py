"""Compile the native runtime to `runtime.wasm`, the one that is shipped: `python -m growfx.deploy.web.build`.

It takes Clang with lld, the C library of WASI and a C++ library for it (Debian: clang, lld, wasi-libc,
libc++-dev-wasm32, libclang-rt-dev-wasm32). `runtime.json` beside it holds the compiler and a digest of the sources, so
that a test knows when the runtime was not built again after a change of them, and with which compiler the same bytes
come out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from growfx.errors import ConfigError
from growfx.runtime.native.sources import SOURCE_FOLDER, source_files

__all__ = ["EXPORTS", "RECORD", "RUNTIME_FILE", "build", "compiler_version", "sources_digest"]

RUNTIME_FILE = Path(__file__).with_name("runtime.wasm")
RECORD = Path(__file__).with_name("runtime.json")
EXPORTS = (
    *("growfx_open_memory", "growfx_close", "growfx_run", "growfx_input_count", "growfx_output_count"),
    *("growfx_input_shape", "growfx_output_shape", "malloc", "free"),
)
_COMPILER = "clang++"
_OPTIONS = (
    *("--target=wasm32-wasi", "-mexec-model=reactor", "-std=c++17", "-O3", "-msimd128"),
    *("-fno-exceptions", "-fno-rtti", "-ffp-contract=fast", "-Wl,--strip-all"),
    # A stack at the bottom of memory: where it runs over, the program ends instead of writing over its data.
    *("-Wl,-z,stack-size=1048576", "-Wl,--stack-first"),
    *(f"-Wl,--export={name}" for name in EXPORTS),
)


def compiler_version() -> str | None:
    """The first line of the compiler's version; None where there is none."""
    if shutil.which(_COMPILER) is None:
        return None
    shown = subprocess.run([_COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    return shown.splitlines()[0]


def sources_digest() -> str:
    """SHA-256 over names and contents of all that is compiled."""
    digest = hashlib.sha256(" ".join(_OPTIONS).encode())
    for file in source_files():
        if file.suffix in (".cpp", ".h", ".inc"):
            digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def build() -> bytes:
    """The bytes of the runtime, compiled anew.

    Raises:
        ConfigError: there is no compiler, or it fails.
    """
    if shutil.which(_COMPILER) is None:
        raise ConfigError(f"`{_COMPILER}` is not installed; on Debian: apt-get install clang lld wasi-libc "
                          "libc++-dev-wasm32 libclang-rt-dev-wasm32")  # fmt: skip
    names = [file.name for file in source_files() if file.suffix == ".cpp"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / RUNTIME_FILE.name
        # Relative names and the sources' folder: no path of this machine can get into the result.
        command = [_COMPILER, *_OPTIONS, *names, "-o", str(target)]
        done = subprocess.run(command, cwd=SOURCE_FOLDER, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"`{_COMPILER}` fails: {_first_error(done.stderr)}")
        return target.read_bytes()


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "without a message")


def main() -> None:
    """Write the runtime and its record."""
    data = build()
    record: dict[str, Any] = {"compiler": compiler_version(), "sources": sources_digest(), "bytes": len(data)}
    RUNTIME_FILE.write_bytes(data)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{RUNTIME_FILE.name}: {len(data):,} bytes, by {record['compiler']}")


if __name__ == "__main__":
    main()
