"""A network in onnxruntime, called like a torch module."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growfx.errors import ConfigError

__all__ = ["OnnxSession"]


class OnnxSession(nn.Module):
    """Runs an ONNX file on the CPU; it takes the inputs in the file's order and gives a tensor, or a list of them.

    Args:
        file: as `growfx.export_onnx` writes it.
        threads: of one operator; operators run one after the other, as in torch.

    Raises:
        ConfigError: onnxruntime is not installed, or does not take the file.
    """

    def __init__(self, file: Path, threads: int) -> None:
        super().__init__()
        if importlib.util.find_spec("onnxruntime") is None:
            raise ConfigError("onnxruntime is not installed: pip install onnxruntime")
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
            raise ConfigError(
                f"onnxruntime does not take the network ({str(error).strip().splitlines()[0]})"
            ) from error
        self.names = [given.name for given in self.session.get_inputs()]

    def forward(self, *inputs: Any) -> Any:
        """The network's outputs for these tensors; other values are part of the file."""
        arrays = [value.numpy() for value in inputs if isinstance(value, Tensor)]
        outputs = [torch.from_numpy(y) for y in self.session.run(None, dict(zip(self.names, arrays, strict=True)))]
        return outputs[0] if len(outputs) == 1 else outputs
