"""Export a network as an ONNX file, for runtimes other than torch.

ONNX runtimes compute densely: the file is as large as the dense network and its zeros bring no speed.
"""

import copy
import importlib.util
import inspect
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.deploy.onnx_trial import Trial
from growfx.errors import ArtifactError, ConfigError
from growfx.file_paths import as_path
from growfx.masked.doors import as_masked_graph, is_masked_graph
from growfx.notices import warn_once
from growfx.quiet import ignored_warnings
from growfx.recorded.inputs import Inputs

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

    They are numbered in the order of the arguments and of the results, tensors inside containers included; arguments
    that are no tensors are fixed. With `batch`, what is written is compared with the network at other batch sizes.

    Args:
        path_or_net: an artifact (as `growfx.load` takes), a `growfx.MaskedGraph`, or any module.
        file: the file to write; one that exists is replaced.
        example_inputs: in the forms of `growfx.wrap`; by default those of the masked graph, those the artifact tells
            of, or one of the input size that the model states.
        batch: leave the size of the first axis of every input open.

    Returns:
        The file.

    Raises:
        ConfigError: `onnx` and `onnxscript` are not installed, the network cannot be expressed in ONNX, or with `batch`
            it computes something else at another batch size.
        ArtifactError: no artifact at the path, or the file cannot be written.
        TraceError: `example_inputs` are of another form.

    Warns:
        GrowfxWarning: the model changes buffers at each call, which the file does not, or computes complex numbers.

    Example:
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), density=0.5)
        >>> growfx.export_onnx(net, "net.onnx").name
        'net.onnx'
    """
    require_onnx()
    target = onnx_target(file)
    model, inputs = _prepared(path_or_net, example_inputs)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, Tensor))
    if size >= _LARGEST:
        raise ConfigError(f"one ONNX file holds less than {_LARGEST} bytes and the network has {size}")
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


def _prepared(source: str | Path | nn.Module, example: Any) -> tuple[nn.Module, Inputs]:
    """The plain network in eval mode, and inputs on its device; a network given is not changed."""
    from growfx.artifact.remembered_inputs import default_inputs
    from growfx.deploy.plain import load_to_export
    from growfx.models.build import default_input_shape
    from growfx.passes.mask.swap import unwrap
    from growfx.recorded.inputs import as_inputs, require_input_values

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
    inputs = inputs.copied(lambda x: x.to(tensor.device, copy=True))
    return model, inputs


def _export(model: nn.Module, call: Inputs, file: Path, batch: bool) -> None:
    if batch:
        # A size of one would be taken for a constant.
        call = call.copied(lambda x: torch.cat([x, x]) if x.shape[:1] == (1,) else x)
    names = [f"input_{i}" for i, _ in enumerate(_tensors(call.values))]
    trial = Trial(model)
    outputs = trial.outputs(call)
    results = [f"output_{i}" for i in range(max(1, len(outputs)))]
    if taken := sorted({*names, *results} & model.state_dict().keys()):
        raise ConfigError(
            f"the network has a parameter or buffer `{taken[0]}`, which is a name of the file's; rename it"
        )
    hint = "; `batch=False` (`--fixed-batch`) fixes the batch size, which may help" if batch else ""
    try:
        # torch announces changes of its own exporter: nothing to act on here.
        with ignored_warnings(), torch.no_grad():
            program = torch.onnx.export(
                model,
                # Its last argument, where that is a dictionary, would be taken for keyword arguments.
                (*call.args, {}) if call.args and isinstance(call.args[-1], dict) and not call.kwargs else call.args,
                str(file),
                kwargs=dict(call.kwargs) or None,
                dynamo=True,
                dynamic_shapes=_open_axes(model, call) if batch else None,
                external_data=False,
                input_names=names,
                output_names=results,
                verbose=False,
            )
    except OSError:
        raise
    except Exception as error:  # torch.onnx raises many kinds, of modules that move between releases
        reason = _cause_of(error)
        if plain := [x for x in outputs if not isinstance(x, Tensor)]:
            reason += f"; it returns a value of type `{type(plain[0]).__name__}`, and a file holds tensors only"
        raise ConfigError(f"the network cannot be exported to ONNX by this torch ({reason}){hint}") from error
    exported = getattr(program, "exported_program", None)
    if exported is None:
        return
    if batch and (why := trial.depends_on_batch(exported, call)):
        raise ConfigError(f"the network cannot be exported to ONNX for every batch size: {why}{hint}")
    _warn_of_losses(exported, [*_tensors(call.values), *outputs])


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among arguments, containers included, in the order in which torch's exporter takes them."""
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


def _open_axes(model: nn.Module, call: Inputs) -> Any:
    """Which axes are open, nested as torch's exporter binds the arguments to the names of `forward`."""
    axes = lambda x: {0: torch.export.Dim.DYNAMIC} if isinstance(x, Tensor) and x.ndim else None  # noqa: E731
    try:
        bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    except (TypeError, ValueError):  # torch says what is wrong with it
        bound = {}
    return {name: pytree.tree_map(axes, value) for name, value in bound.items()} or tuple(map(axes, call.values))


def _warn_of_losses(exported: Any, values: list[Any]) -> None:
    """Tell of what the model does and the file does not."""
    if written := sorted(set(exported.graph_signature.buffers_to_mutate.values())):
        listed = ", ".join(f"`{name}`" for name in written)
        warn_once(
            f"the model changes {listed} whenever it is called; the ONNX file computes with what {listed} "
            f"{'holds' if len(written) == 1 else 'hold'} now, at every call",
            [],
        )
    if any(isinstance(x, Tensor) and x.is_complex() for x in values):
        warn_once("ONNX has no complex numbers: in the file their real and imaginary parts are a last axis of two", [])


def _cause_of(error: BaseException) -> str:
    """What torch's exporter failed at; its own message is that it did, with advice for its authors."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else ""
    return f"{type(error).__name__}: {text}".removesuffix(": ")[:_LONGEST_REASON]
