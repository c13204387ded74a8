"""Export a network as an ONNX file, for runtimes other than torch.

ONNX runtimes compute densely: the file is as large as the dense network and its zeros bring no speed.
"""

import copy
import importlib.util
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growfx.errors import ArtifactError, ConfigError
from growfx.file_paths import as_path
from growfx.masked.doors import as_masked_graph, is_masked_graph
from growfx.quiet import ignored_warnings

__all__ = ["export_onnx", "onnx_target", "require_onnx"]

# What torch.onnx.export imports beyond torch.
_NEEDED = ("onnx", "onnxscript")
# Beyond it a protobuf message cannot be read; weights would have to go to a second file.
_LARGEST = 1 << 31
_LONGEST_REASON = 500
_DOOR = "growfx.export_onnx"


@torch.inference_mode(False)  # what is copied inside such a block cannot be traced
def export_onnx(
    path_or_net: str | Path | nn.Module,
    file: str | Path,
    *,
    example_inputs: Any = None,
    batch: bool = True,
) -> Path:
    """Write a network as one ONNX file, atomically; inputs are `input_0` ..., outputs `output_0` ...

    Args:
        path_or_net: an artifact (as `growfx.load` takes), a `growfx.MaskedGraph`, or any module.
        file: the file to write; one that exists is replaced.
        example_inputs: in the forms of `growfx.wrap`; by default those of the masked graph, those the artifact tells
            of, or one of the input size that the model states.
        batch: leave the size of the first axis of every input open.

    Returns:
        The file.

    Raises:
        ConfigError: `onnx` and `onnxscript` are not installed, or the network cannot be expressed in ONNX.
        ArtifactError: no artifact at the path, or the file cannot be written.
        TraceError: `example_inputs` are of another form.

    Example:
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), density=0.5)
        >>> growfx.export_onnx(net, "net.onnx").name
        'net.onnx'
    """
    require_onnx()
    target = onnx_target(file)
    model, inputs, named = _prepared(path_or_net, example_inputs)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, Tensor))
    if size >= _LARGEST:
        raise ConfigError(f"one ONNX file holds less than {_LARGEST} bytes and the network has {size}")
    part = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _export(model, inputs, named, part, batch)
        os.replace(part, target)
    except OSError as error:
        raise ArtifactError(f"`{target}` cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return target


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def onnx_target(file: Any) -> Path:
    """The file to write; ArtifactError where it cannot be one."""
    target = as_path(file, _DOOR, ArtifactError)
    if target.is_dir():
        raise ArtifactError(f"`{target}` is a folder; give the path of a file, for example `{target / 'model.onnx'}`")
    return target


def require_onnx() -> None:
    """Raise `ConfigError` where a package that the export needs is missing."""
    missing = [name for name in _NEEDED if not _is_installed(name)]
    if missing:
        raise ConfigError(f"export to ONNX needs {' and '.join(missing)}: pip install {' '.join(_NEEDED)}")


def _prepared(source: str | Path | nn.Module, example: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The plain network in eval mode, its inputs on its device and by keyword; a network given is not changed."""
    from growfx.artifact.remembered_inputs import default_inputs
    from growfx.deploy.plain import load_to_export
    from growfx.models.build import default_input_shape
    from growfx.passes.mask.swap import unwrap
    from growfx.recorded.inputs import Inputs, as_inputs, require_input_values

    known = None
    if isinstance(source, str | Path):
        model: nn.Module = load_to_export(source, _DOOR)
    elif is_masked_graph(source):
        net = as_masked_graph(source, _DOOR)
        known = net.example()
        model = unwrap(net).eval()
    elif isinstance(source, nn.Module):
        model = copy.deepcopy(source).eval()
    else:
        kind = type(source).__name__
        raise ConfigError(f"{_DOOR} expects an artifact's path, a MaskedGraph or a module, got `{kind}`")
    tensor = next((t for t in model.parameters() if t.is_floating_point()), torch.empty(0))
    known = known or default_inputs(model)
    if example is not None:
        known = as_inputs(example)
    inputs = known or Inputs((torch.zeros(default_input_shape(model), dtype=tensor.dtype),), {})
    require_input_values(inputs, _DOOR)
    # Copies, since what was made in inference mode cannot be traced either.
    move = lambda x: x.to(tensor.device, copy=True) if isinstance(x, Tensor) else x  # noqa: E731
    return model, tuple(map(move, inputs.args)), {key: move(value) for key, value in inputs.kwargs.items()}


def _export(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], file: Path, batch: bool) -> None:
    size: Any = torch.export.Dim.DYNAMIC
    values = [*inputs, *named.values()]
    axes: Any = tuple({0: size} if isinstance(x, Tensor) and x.ndim else None for x in values) if batch else None
    # A size of one would be taken for a constant.
    if batch:
        values = [torch.cat([x, x]) if isinstance(x, Tensor) and x.shape[:1] == (1,) else x for x in values]
    names = [f"input_{i}" for i, x in enumerate(values) if isinstance(x, Tensor)]
    keywords = dict(zip(named, values[len(inputs) :], strict=True))
    try:
        # torch announces changes of its own exporter: nothing to act on here.
        with ignored_warnings(), torch.no_grad():
            torch.onnx.export(
                model,
                tuple(values[: len(inputs)]),
                str(file),
                kwargs=keywords or None,
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
        reason = _cause_of(error)
        hint = "; `batch=False` fixes the batch size, which may help" if batch else ""
        raise ConfigError(f"the network cannot be exported to ONNX by this torch ({reason}){hint}") from error


def _cause_of(error: BaseException) -> str:
    """What torch's exporter failed at; its own message is that it did, with advice for its authors."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = (line.strip() for line in str(error).splitlines())
    text = next((line for line in lines if line), "")
    return f"{type(error).__name__}: {text}".removesuffix(": ")[:_LONGEST_REASON]
