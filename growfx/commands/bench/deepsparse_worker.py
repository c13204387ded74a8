"""Run an ONNX file in DeepSparse for another process; a script for the Python that has DeepSparse, not for growfx's.

DeepSparse 1.8.0 needs Python 3.11 and an onnx below 1.15, which growfx's own export does not work with: so it lives in
an environment of its own, and this script imports nothing of growfx.

    python deepsparse_worker.py FILE BATCH THREADS

Standard input and output carry, for each call, a line of JSON with the dtype and shape of each array, and then the
bytes of these. The first line that is written says `ready`, or, as every other one may, `error` and the reason.
"""

import json
import math
import os
import sys
from typing import BinaryIO


def main() -> None:
    """Serve calls until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints must not get among the answers
    file, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    try:
        import deepsparse  # pyright: ignore[reportMissingImports]
        import numpy

        engine = deepsparse.Engine(model=file, batch_size=batch, num_cores=threads)
        tell(answers, "ready")
        while line := sys.stdin.buffer.readline():
            kinds = [(numpy.dtype(name), shape) for name, shape in json.loads(line)]
            sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in kinds]
            given = [bytearray(sys.stdin.buffer.read(size)) for size in sizes]
            arrays = [numpy.frombuffer(data, kind[0]).reshape(kind[1]) for data, kind in zip(given, kinds, strict=True)]
            outputs = [numpy.ascontiguousarray(output) for output in engine.run(arrays)]
            tell(answers, json.dumps([(output.dtype.str, output.shape) for output in outputs]))
            for output in outputs:
                answers.write(output.tobytes())
            answers.flush()
    except Exception as error:  # of any library; the other process tells it
        tell(answers, f"error {type(error).__name__}: {' '.join(str(error).split())}")


def tell(answers: BinaryIO, text: str) -> None:
    """Write one line."""
    answers.write(f"{text}\n".encode())
    answers.flush()


if __name__ == "__main__":
    main()
