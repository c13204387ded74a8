"""A network in another runtime, called like a torch module: onnxruntime, OpenVINO and DeepSparse, each where installed.

onnxruntime and OpenVINO compute densely, whatever the weights; DeepSparse (retired in 2025) leaves out zeros. All of
them read the ONNX file of the network with its zeros. DeepSparse does not go together with growfx's own packages:
`GROWFX_DEEPSPARSE` names the Python of an environment that has it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from growfx.errors import ConfigError
from growfx.quiet import ignored_warnings

__all__ = [
    "DEEPSPARSE",
    "DEEPSPARSE_PYTHON",
    "ONNXRUNTIME",
    "OPENVINO",
    "OPENVINO_DEFAULT",
    "PACKAGES",
    "PEERS",
    "DeepSparse",
    "OnnxSession",
    "OpenVino",
    "Peer",
    "export_for_deepsparse",
    "is_offered",
    "missing_packages",
    "peer_versions",
]

ONNXRUNTIME, OPENVINO, OPENVINO_DEFAULT, DEEPSPARSE = (
    "onnxruntime",
    "openvino float32",
    "openvino default",
    "deepsparse",
)
PACKAGES = ("onnxruntime", "openvino")
# The environment's variable that names the Python which has DeepSparse.
DEEPSPARSE_PYTHON = "GROWFX_DEEPSPARSE"
# What exporting the network to ONNX needs.
_ONNX = ("onnx", "onnxscript")


@dataclass(frozen=True)
class Peer:
    """What another runtime needs, and what it stands for.

    Attributes:
        packages: imported by it or by the export it reads, under the names they are installed by.
        is_yardstick: it runs the dense network in float32: speeds are also told over the best of these.
        variable: the environment's variable that it also needs; without it, it is not offered either.
    """

    packages: tuple[str, ...]
    is_yardstick: bool = False
    variable: str | None = None


PEERS: Mapping[str, Peer] = {
    ONNXRUNTIME: Peer(("onnxruntime", *_ONNX), is_yardstick=True),
    OPENVINO: Peer(("openvino", "packaging", *_ONNX), is_yardstick=True),  # it imports packaging, undeclared
    OPENVINO_DEFAULT: Peer(("openvino", "packaging", *_ONNX)),
    DEEPSPARSE: Peer(_ONNX, variable=DEEPSPARSE_PYTHON),
}


def is_offered(name: str) -> bool:
    """Whether a variant can be had by installing packages; so all that are not peers."""
    variable = PEERS[name].variable if name in PEERS else None
    return variable is None or bool(os.environ.get(variable))


def missing_packages(name: str) -> list[str]:
    """The packages a variant needs that are not installed; none for a variant that is not a peer."""
    return [package for package in PEERS[name].packages if not _is_installed(package)] if name in PEERS else []


def peer_versions() -> dict[str, str]:
    """The versions of onnxruntime and OpenVINO where they are installed under their own names."""
    found: dict[str, str] = {}
    for name in filter(_is_installed, PACKAGES):
        with suppress(importlib.metadata.PackageNotFoundError):  # part of a package such as onnxruntime-gpu
            found[name] = importlib.metadata.version(name)
    return found


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _arrays(inputs: Sequence[Any]) -> list[Any]:
    """The tensors among the inputs as numpy arrays; other values are part of the file."""
    return [value.numpy() for value in inputs if isinstance(value, Tensor)]


def _tensors(arrays: Sequence[Any]) -> Any:
    outputs = [torch.from_numpy(array) for array in arrays]
    return outputs[0] if len(outputs) == 1 else outputs


def _refused(runtime: str, error: Exception) -> ConfigError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ConfigError(f"{runtime} does not take the network ({lines[0] if lines else type(error).__name__})")


class OnnxSession(nn.Module):
    """Runs an ONNX file on the CPU; it takes the inputs in the file's order and gives a tensor, or a list of them.

    Args:
        file: as `growfx.export_onnx` writes it.
        threads: of one operator; operators run one after the other, as in torch.

    Raises:
        ConfigError: onnxruntime does not take the file.
    """

    def __init__(self, file: Path, threads: int) -> None:
        super().__init__()
        import onnxruntime

        runtime: Any = onnxruntime  # its names come from a compiled module
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        # Its threads would spin on after a run, and slow down whatever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session: Any = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its error classes are private to it
            raise _refused("onnxruntime", error) from error
        self.names = [given.name for given in self.session.get_inputs()]

    def forward(self, *inputs: Any) -> Any:
        """The network's outputs for these tensors."""
        return _tensors(self.session.run(None, dict(zip(self.names, _arrays(inputs), strict=True))))


class OpenVino(nn.Module):
    """Runs an ONNX file in OpenVINO on the CPU, as one stream.

    Args:
        file: as `growfx.export_onnx` writes it.
        threads: of the stream.
        precision: an `INFERENCE_PRECISION_HINT` such as `f32`; None leaves the choice to OpenVINO, which computes in
            bfloat16 where the processor does so natively.

    Attributes:
        precision: what it computes in, in OpenVINO's words.

    Raises:
        ConfigError: OpenVINO does not take the file.
    """

    def __init__(self, file: Path, threads: int, precision: str | None = None) -> None:
        super().__init__()
        import openvino  # pyright: ignore[reportMissingImports]  # optional

        runtime: Any = openvino
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        if precision is not None:
            options["INFERENCE_PRECISION_HINT"] = precision
        try:
            self.model: Any = runtime.Core().compile_model(str(file), "CPU", options)
            self.request: Any = self.model.create_infer_request()
            self.precision = str(self.model.get_property("INFERENCE_PRECISION_HINT").to_string())
        except Exception as error:  # its compiled module raises plain RuntimeError, and others
            raise _refused("openvino", error) from error
        self.outputs = len(self.model.outputs)

    def forward(self, *inputs: Any) -> Any:
        """The network's outputs for these tensors."""
        # Inputs are shared; outputs are copied, for the next call writes over them.
        found = self.request.infer(_arrays(inputs), share_inputs=True)
        return _tensors([found[i] for i in range(self.outputs)])


def export_for_deepsparse(model: nn.Module, inputs: tuple[Any, ...], file: Path) -> Path:
    """Write a network as ONNX of 2021: DeepSparse 1.8.0 takes neither the operators nor the files of today's exporter.

    Raises:
        ConfigError: torch's older exporter does not take the network.
    """
    try:
        with ignored_warnings(), torch.no_grad():
            torch.onnx.export(model, inputs, str(file), dynamo=False, opset_version=14)
    except Exception as error:  # torch.onnx raises many kinds
        raise ConfigError(f"torch's older ONNX exporter does not take the network ({type(error).__name__})") from error
    return file


class DeepSparse(nn.Module):
    """Runs an ONNX file in DeepSparse, which leaves out weights of zero; in a process of another Python.

    Args:
        file: as `export_for_deepsparse` writes it, for one batch size.
        batch: that batch size.
        threads: cores it may use.
        python: the program; default: that of `GROWFX_DEEPSPARSE`.

    Raises:
        ConfigError: there is no such Python, it has no DeepSparse, or DeepSparse does not take the file.
    """

    def __init__(self, file: Path, batch: int, threads: int, python: str | None = None) -> None:
        super().__init__()
        program = python or os.environ.get(DEEPSPARSE_PYTHON, "")
        script = str(Path(__file__).with_name("deepsparse_worker.py"))
        environment = os.environ | {"NM_DISABLE_ANALYTICS": "1", "PYTHONPATH": ""}
        try:
            self.process = subprocess.Popen(
                [program, script, str(file), str(batch), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise ConfigError(f"`{DEEPSPARSE_PYTHON}` = `{program}` is not a Python ({error.strerror})") from error
        weakref.finalize(self, _ended, self.process)
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode().strip()
        if line.startswith("error ") or not line:
            raise _refused(DEEPSPARSE, RuntimeError(line.removeprefix("error ") or "its process has ended"))
        return line

    def forward(self, *inputs: Any) -> Any:
        """The network's outputs for these tensors."""
        arrays = _arrays(inputs)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        kinds = [(array.dtype.str, array.shape) for array in arrays]
        self.process.stdin.write(json.dumps(kinds).encode() + b"\n")
        for array in arrays:
            self.process.stdin.write(array.tobytes())
        self.process.stdin.flush()
        answered = [(np.dtype(name), shape) for name, shape in json.loads(self._answer())]
        stream = self.process.stdout
        found = [bytearray(stream.read(dtype.itemsize * math.prod(shape))) for dtype, shape in answered]
        return _tensors(
            [np.frombuffer(x, kind).reshape(shape) for x, (kind, shape) in zip(found, answered, strict=True)]
        )

    def processor_seconds(self) -> float:
        """Processor time of the other process until now."""
        return time.clock_gettime(_clock_of(self.process.pid))


def _clock_of(pid: int) -> int:
    """The clock of a process's processor time; Linux numbers them so (`clock_getcpuclockid` of its C library)."""
    return (~pid << 3) | 2


def _ended(process: subprocess.Popen[bytes]) -> None:
    """End a worker, which ends when it is told nothing more."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
        return
    process.kill()
    process.wait()
