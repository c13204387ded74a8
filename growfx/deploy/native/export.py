"""Export a network as a folder that needs neither torch nor Python: `growfx.export_native`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growfx.artifact import reader
from growfx.artifact.remembered_inputs import default_inputs
from growfx.artifact.staging import staged_folder
from growfx.deploy.native.readme import readme
from growfx.deploy.plain import load_to_export
from growfx.errors import ArtifactError, ConfigError
from growfx.file_paths import as_path
from growfx.masked.doors import as_masked_graph, is_masked_graph, require_values
from growfx.masked.modules import cast_floating
from growfx.masked.twins import masks_by_parameter
from growfx.models.build import default_input_shape
from growfx.passes.lower.plan import plan_network
from growfx.passes.lower.plan.file import network_bytes
from growfx.passes.mask.swap import unwrap
from growfx.recorded.inputs import Inputs, as_inputs, require_input_values
from growfx.runtime.native.plan import Plan
from growfx.runtime.native.sources import source_files

__all__ = ["NETWORK", "NativeExport", "export_native", "native_plan", "native_target", "prepared_network"]

NETWORK = "network.gfx"


@dataclass(frozen=True)
class NativeExport:
    """What `growfx.export_native` wrote.

    Attributes:
        path: the folder.
        bytes: of `network.gfx`.
        steps: calls of a kernel in one run.
        folded: norms and factors that went into weights.
        memory: bytes of the buffers of a run of one row.
        inputs, outputs: shapes, with `batch` for the number of rows.
    """

    path: Path
    bytes: int
    steps: int
    folded: int
    memory: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same facts for programs."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "steps": self.steps,
            "folded": self.folded,
            "memory": self.memory,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
        }

    def __str__(self) -> str:
        return (
            f"{self.path}: {NETWORK} of {self.bytes:,} bytes, {self.steps} steps, {self.memory:,} bytes of buffers for "
            f"one row; inputs {', '.join(self.inputs)}, outputs {', '.join(self.outputs)}"
        )


@torch.inference_mode(False)
def export_native(
    path_or_net: str | Path | nn.Module, out: str | Path, *, example_inputs: Tensor | tuple[Tensor, ...] | None = None
) -> NativeExport:
    """Write a folder that runs a network without torch and Python: `network.gfx`, C++ sources, an example, README.

    The network computes in float32, with norms folded into weights; its outputs equal the network's up to rounding, for
    any batch size. Weights without an edge are not stored and not computed with, so a NaN or infinity reaches the
    outputs that active weights connect it to, and no others.

    Args:
        path_or_net: an artifact (as `growfx.load` takes), a `growfx.MaskedGraph`, or any module.
        out: the folder to write; it must not exist, or be empty.
        example_inputs: float tensors whose first axis is the batch; the sizes of all other axes are fixed by them. By
            default those of the masked graph, those the artifact tells of, or one of the size that the model states.

    Returns:
        What was written.

    Raises:
        UnsupportedOperatorError: operators without a kernel; names them all, and nothing is written.
        TraceError: the operators that run depend on the data or on the batch size, or a call writes into its inputs or
            changes the network, which the exported one would not.
        ArtifactError: no artifact at the path, or the folder is not empty or cannot be written.
        ConfigError: something else than a network, or one on the meta device, without values.

    Example:
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), density=0.5)
        >>> made = growfx.export_native(net, "native")
        >>> made.inputs, made.outputs
        (('batch x 4',), ('batch x 2',))
    """
    target = native_target(out)
    plan = native_plan(path_or_net, example_inputs)
    data = network_bytes(plan)
    made = _described(target, plan, len(data))
    try:
        with staged_folder(target, last=NETWORK) as stage:
            (stage / NETWORK).write_bytes(data)
            for file in source_files():
                shutil.copyfile(file, stage / file.name)
            (stage / "README.md").write_text(readme(made.inputs, made.outputs), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"`{target}` cannot be written ({error.strerror or error})") from error
    return made


def native_target(out: Any, door: str = "growfx.export_native") -> Path:
    """The folder to write.

    Raises:
        ArtifactError: it is a file, or a folder with something in it.
    """
    target = as_path(out, door, ArtifactError)
    if target.is_dir():
        if any(target.iterdir()):
            raise ArtifactError(f"`{target}` is not empty; give the path of a new folder")
    elif target.exists() or target.is_symlink():
        raise ArtifactError(f"`{target}` is a file; give the path of a new folder")
    return target


def native_plan(path_or_net: Any, example_inputs: Any = None, door: str = "growfx.export_native") -> Plan:
    """The plan of an artifact, a masked graph or a module; see `export_native`."""
    model, masks, inputs = prepared_network(path_or_net, example_inputs, door)
    return plan_network(model, masks, inputs)


def prepared_network(source: Any, example: Any, door: str) -> tuple[nn.Module, dict[str, Tensor], Inputs]:
    """A plain network of its own in float32 on the CPU, masks by the name of their parameter, example inputs."""
    import copy

    known, masks = None, dict[str, Tensor]()
    if isinstance(source, str | Path):
        model, masks = load_to_export(source, door), reader.load_masks(source)
        known = default_inputs(model)
    elif is_masked_graph(source):
        net = as_masked_graph(source, door)
        model, known, masks = copy.deepcopy(unwrap(net)), net.example(), dict(net.masks)
    elif isinstance(source, nn.Module):
        model = copy.deepcopy(source)
        known = default_inputs(model)
    else:
        raise ConfigError(
            f"{door} expects an artifact's path, a MaskedGraph or a module, got `{type(source).__name__}`"
        )
    model = cast_floating(require_values(model, door).to("cpu"), torch.float32).eval().requires_grad_(False)
    if example is not None:
        inputs = as_inputs(example)
    elif known is not None:
        inputs = known
    else:
        inputs = Inputs((torch.zeros(default_input_shape(model)),), {})
    return model, masks_by_parameter(model, masks), _in_float32(require_input_values(inputs, door))


def _in_float32(inputs: Inputs) -> Inputs:
    def cast(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().to("cpu", torch.float32) if floats else value

    return Inputs(tuple(map(cast, inputs.args)), {key: cast(value) for key, value in inputs.kwargs.items()})


def _described(target: Path, plan: Plan, nbytes: int) -> NativeExport:
    def shapes(ids: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(" x ".join(map(str, plan.values[i].shape)) for i in ids)

    return NativeExport(
        target, nbytes, len(plan.steps), plan.folded, plan.memory(1), shapes(plan.inputs), shapes(plan.outputs)
    )
