"""A network as an ONNX file, for runtimes other than torch.

ONNX runtimes compute densely: the file is as large as the dense network and its zeros bring no speed.
"""

import importlib.util
import os
import uuid
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growfx.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["export_onnx"]

# What torch.onnx.export imports beyond torch.
_NEEDED = ("onnx", "onnxscript")
# Beyond it a protobuf message cannot be read; weights would have to go to a second file.
_LARGEST = 1 << 31


def export_onnx(
    path_or_net: "str | Path | nn.Module",
    file: str | Path,
    *,
    example_inputs: "Tensor | tuple[Any, ...] | None" = None,
    batch: bool = True,
) -> Path:
    """Write a network as one ONNX file, whole or not at all; inputs are `input_0` ..., outputs `output_0` ...

    Args:
        path_or_net: an artifact (as `growfx.load` takes), a `growfx.MaskedGraph`, or any module.
        file: the file to write; one that exists is replaced.
        example_inputs: by default those of the masked graph, or one of the input size that the model states.
        batch: leave the size of the first axis of every input open.

    Returns:
        The file.

    Raises:
        ConfigError: `onnx` and `onnxscript` are not installed, or the network cannot be expressed in ONNX.
        ArtifactError: no artifact at the path, or the file cannot be written.
    """
    missing = [name for name in _NEEDED if not _is_installed(name)]
    if missing:
        raise ConfigError(f"export to ONNX needs {' and '.join(missing)}: pip install {' '.join(_NEEDED)}")
    import torch

    model, inputs = _prepared(path_or_net, example_inputs)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, torch.Tensor))
    if size >= _LARGEST:
        raise ConfigError(f"one ONNX file holds less than {_LARGEST} bytes and the network has {size}")
    target = Path(file)
    part = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _export(model, inputs, part, batch)
        os.replace(part, target)
    except OSError as error:
        raise ArtifactError(f"`{target}` cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return target


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _prepared(source: "str | Path | nn.Module", example: Any) -> "tuple[nn.Module, tuple[Any, ...]]":
    """The plain network in eval mode and its inputs on its device; a network given stays as it is."""
    import copy

    import torch
    from torch import nn

    from growfx.artifact import load
    from growfx.graph import MaskedGraph
    from growfx.models import default_input_shape
    from growfx.passes.mask import unwrap

    if isinstance(source, str | Path):
        model: nn.Module = load(source)
    elif isinstance(source, MaskedGraph):
        example = source.example_inputs() if example is None else example
        model = unwrap(copy.deepcopy(source)).eval()
    elif isinstance(source, nn.Module):
        model = copy.deepcopy(source).eval()
    else:
        raise ConfigError(f"export_onnx takes an artifact's path or a module, not a `{type(source).__name__}`")
    tensor = next((t for t in model.parameters() if t.is_floating_point()), torch.empty(0))
    if example is None:
        example = torch.zeros(default_input_shape(model), dtype=tensor.dtype)
    inputs = example if isinstance(example, tuple) else (example,)
    return model, tuple(x.to(tensor.device) if isinstance(x, torch.Tensor) else x for x in inputs)


def _export(model: "nn.Module", inputs: tuple[Any, ...], file: Path, batch: bool) -> None:
    import torch

    size: Any = torch.export.Dim.DYNAMIC
    axes: Any = tuple({0: size} if isinstance(x, torch.Tensor) and x.ndim else None for x in inputs) if batch else None
    # A size of one would be taken for a constant.
    if batch:
        inputs = tuple(torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.shape[:1] == (1,) else x for x in inputs)
    names = [f"input_{i}" for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # torch announces changes of its own exporter: nothing to act on here.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                inputs,
                str(file),
                dynamo=True,
                dynamic_shapes=axes,
                external_data=False,
                input_names=names,
                output_names=["output_0"],
                verbose=False,
            )
    except OSError:
        raise
    except Exception as error:  # torch.onnx raises many kinds, of modules that move between releases
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "; `batch=False` fixes the batch size, which may help" if batch else ""
        raise ConfigError(f"the network cannot be exported to ONNX by this torch ({reason}){hint}") from error
