"""Export a network as a page that runs it in a browser: `growfx.export_web`."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growfx.artifact import reader
from growfx.artifact.staging import staged_folder
from growfx.artifact.writer import check_provenance
from growfx.data.loaders import InputFormat
from growfx.deploy.native.export import native_target, prepared_network
from growfx.deploy.web.facts import class_names, drawing_grain, expected_output, image_shape, input_format, is_drawable
from growfx.deploy.web.page import PAGE, page_text, runtime_bytes
from growfx.errors import ArtifactError
from growfx.masked.doors import is_masked_graph
from growfx.models.build import identity_of
from growfx.passes.lower.plan import plan_network
from growfx.passes.lower.plan.file import network_bytes

__all__ = ["WebExport", "export_web"]

_DOOR = "growfx.export_web"


@dataclass(frozen=True)
class WebExport:
    """What `growfx.export_web` wrote.

    Attributes:
        path: the folder.
        page: the document in it, which needs nothing else.
        bytes: of the document.
        network_bytes, runtime_bytes: of the network and of the runtime inside, before they are written as text.
        classes: how many the network tells apart.
    """

    path: Path
    page: Path
    bytes: int
    network_bytes: int
    runtime_bytes: int
    classes: int

    def to_json(self) -> dict[str, Any]:
        """The same facts for programs."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in self.__dict__.items()}

    def __str__(self) -> str:
        return (
            f"{self.page}: {self.bytes:,} bytes, with the network ({self.network_bytes:,} bytes) and the runtime "
            f"({self.runtime_bytes:,} bytes) inside; open it in a browser"
        )


@torch.inference_mode(False)
def export_web(
    path_or_net: str | Path | nn.Module,
    out: str | Path,
    *,
    example_inputs: Tensor | tuple[Tensor, ...] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> WebExport:
    """Write a page that runs a network in a browser, on an image that is dropped or a digit that is drawn.

    The page is one file, `index.html`, with the network and the runtime of `growfx.export_native` in WebAssembly (SIMD)
    inside. It loads nothing and sends nothing, so it works from a disk as from a server. It shows the classes with the
    highest scores, milliseconds, size and density, and says whether this browser computes what torch does: both run the
    network on the same noise, and may differ by 1e-4 of the largest output.

    Args:
        path_or_net: an artifact (as `growfx.load` takes), a `growfx.MaskedGraph`, or any module, of a network that
            takes one batch of images of 1 or 3 channels and gives a score for each class.
        out: the folder to write; it must not exist, or be empty.
        example_inputs: one float tensor, (batch, channels, height, width); by default as `growfx.export_native`.
        provenance: as given to `growfx.save`; by default an artifact's own. `input` says how images are prepared (mean,
            std, interpolation, crop_pct of `growfx.data.loaders.InputFormat`), without it the model's
            `pretrained_cfg` does; `data` has the names of the classes.

    Returns:
        What was written.

    Raises:
        UnsupportedOperatorError: operators without a kernel; names them all, and nothing is written.
        TraceError: the operators that run depend on the data or on the batch size, or a call writes into its inputs or
            changes the network, which the exported one would not.
        ArtifactError: no artifact at the path, an input format that cannot be meant, or the folder is not empty or
            cannot be written.
        ConfigError: something else than such a network.

    Example:
        >>> layers = [torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 10)]
        >>> net = growfx.wrap(torch.nn.Sequential(*layers), torch.randn(1, 1, 8, 8), density=0.5)
        >>> growfx.export_web(net, "web").page.name
        'index.html'
    """
    target = native_target(out, _DOOR)
    check_provenance(provenance)
    model, masks, inputs = prepared_network(path_or_net, example_inputs, _DOOR)
    shape = image_shape(inputs.args, inputs.kwargs)
    origin = _provenance(path_or_net, provenance)
    form = input_format(shape, origin, model)
    network = network_bytes(plan_network(model, masks, inputs))  # says where the network cannot compute such images
    expected = expected_output(model, shape)
    facts = {
        "input": _form_facts(form),
        "classes": class_names(origin, len(expected)),
        "draw": is_drawable(form),
        "grain": drawing_grain(origin),
        "expected": base64.b64encode(expected.numpy().tobytes()).decode(),
        "rows": _rows(model, masks, form, origin, len(network), len(expected)),
    }
    known = identity_of(model)
    name = type(model).__name__ if known is None else known.name
    text = page_text(f"Sparse {name}", "It runs in this browser: nothing is sent anywhere.", facts, network)
    data = text.encode()
    try:
        with staged_folder(target, last=PAGE) as stage:
            (stage / PAGE).write_bytes(data)
    except OSError as error:
        raise ArtifactError(f"`{target}` cannot be written ({error.strerror or error})") from error
    return WebExport(target, target / PAGE, len(data), len(network), len(runtime_bytes()), len(expected))


def _provenance(source: Any, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if given is not None:
        return given
    if is_masked_graph(source) or isinstance(source, nn.Module):
        return {}
    return reader.inspect(source).provenance


def _form_facts(form: InputFormat) -> dict[str, Any]:
    channels, height, width = form.input_size
    facts = form.as_json() | {"channels": channels, "height": height, "width": width}
    del facts["input_size"]
    return facts


def _rows(
    model: nn.Module, masks: Mapping[str, Tensor], form: InputFormat, origin: Mapping[str, Any], size: int, classes: int
) -> list[tuple[str, str]]:
    """What the page tells of the network: names and texts."""
    parameters = sum(p.numel() for p in model.parameters())
    channels, height, width = form.input_size
    rows = [("network", f"{size / 1e3:,.1f} kB; {4 * parameters / 1e3:,.1f} kB when dense, in float32")]
    if masks:
        active, numel = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
        rows.insert(0, ("density", f"{active / numel:.2%}: {active:,} of {numel:,} masked weights are active"))
    rows.append(
        ("input", f"{channels} x {height} x {width}, {_numbers('mean', form.mean)}, {_numbers('std', form.std)}")
    )
    rows.append(("classes", f"{classes:,}"))
    data, result = origin.get("data"), origin.get("result")
    if isinstance(data, Mapping) and data.get("spec"):
        rows.append(("trained on", str(data["spec"])))
    accuracy = result.get("test_accuracy") if isinstance(result, Mapping) else None
    if isinstance(accuracy, float) and math.isfinite(accuracy):
        rows.append(("test accuracy", f"{accuracy:.2%}"))
    return rows


def _numbers(name: str, values: tuple[float, ...]) -> str:
    return f"{name} {', '.join(f'{value:.4g}' for value in dict.fromkeys(values))}"
