"""The README of an exported network."""

from __future__ import annotations

from collections.abc import Sequence

from growfx.version import __version__

__all__ = ["readme"]

_TEXT = """# A sparse network

`network.gfx` is a network with its sparse weights, written by growfx {version}; the other files run it. They need a
C++17 compiler (GCC or Clang) and nothing else: no torch, no Python.

| | shape, float32 |
|---|---|
{shapes}

## Build and run

```sh
cmake -S . -B build && cmake --build build
build/growfx_example network.gfx inputs.f32        # raw float32, rows of the batch one after the other
```

prints one output a line. Without cmake:

```sh
g++ -std=c++17 -O3 -ffp-contract=fast *.cpp example.c -pthread -o growfx_example
```

Kernels for AVX2 and AVX-512 are built in and chosen when the program runs; on aarch64 they use NEON.

## In your own program

```c
#include "growfx.h"

growfx *net;
char error[256];
if (growfx_open("network.gfx", &net, error, sizeof error) != GROWFX_OK) {{ puts(error); return 1; }}
const float *inputs[] = {{ image }};
float *outputs[] = {{ scores }};
if (growfx_run(net, 1, inputs, outputs, error, sizeof error) != GROWFX_OK) puts(error);
growfx_close(net);
```

`growfx.h` tells the rest: shapes at a batch size, threads, a network from memory. Every error is a code and a message;
a file that is damaged is refused, and so is one that needs more memory than a limit (1 GiB of buffers for each row of a
batch), which `growfx_open_bounded` sets.
"""


def readme(inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """The text, with the shapes of the network's inputs and outputs."""
    rows = [
        f"| {kind} {i} | {shape} |"
        for kind, shapes in (("input", inputs), ("output", outputs))
        for i, shape in enumerate(shapes)
    ]
    return _TEXT.format(version=__version__, shapes="\n".join(rows))
