"""The models of the libraries: their names, their families, and inputs they accept.

What a model is called with follows from its task, not from its architecture; sizes come from the model's own
configuration (timm) or from that of its published weights (torchvision).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

import torch
from torch import nn

from growfx.models.build import ModelIdentity, create_model, default_input_shape

__all__ = ["Form", "arguments_of", "family_of", "forms", "identity_of", "library_of", "model_names"]

Shape = tuple[int, ...]

_TORCHVISION = "torchvision/"


@dataclass(frozen=True)
class Form:
    """What a model is called with: `count` tensors of (batch, *shape), or, `listed`, one list of `batch` tensors."""

    shape: Shape
    count: int = 1
    listed: bool = False

    def inputs(self, batch: int, seed: int, device: str = "cpu") -> tuple[Any, ...]:
        """Positional arguments of a call: numbers in [0, 1) for listed images, normal ones otherwise."""
        if device == "meta":
            draw = lambda shape: torch.empty(shape, device="meta")  # noqa: E731
        else:
            generator = torch.Generator().manual_seed(seed)
            kind = torch.rand if self.listed else torch.randn
            draw = lambda shape: kind(shape, generator=generator)  # noqa: E731
        if self.listed:
            return ([draw(self.shape) for _ in range(batch)],)
        return tuple(draw((batch, *self.shape)) for _ in range(self.count))

    def sized(self, height: int, width: int) -> Form:
        """The same with another height and width."""
        return Form((*self.shape[:-2], height, width), self.count, self.listed)

    def others(self) -> list[Form]:
        """The same input at other heights and widths: small ones first, sides that differ before a square."""
        height, width = self.shape[-2:]
        half, wider = max(height // 64 * 32, 32), max(width * 3 // 128 * 32, 64)
        sizes = [(64, 96), (half, wider), (wider, wider), (height + 32, width + 64)]
        return [self.sized(*size) for size in sizes if size != (height, width)]

    def smaller_than(self, other: Form) -> bool:
        """Whether a call with this form takes less time than one with the other."""
        return self.shape[-1] < other.shape[-1]

    def to_json(self) -> list[list[int]]:
        """Shapes of the tensors at batch 1."""
        return [[*self.shape] if self.listed else [1, *self.shape]] * self.count


@dataclass(frozen=True)
class _Task:
    """`arguments`: keyword arguments of the builder, the first it takes: small images, and detections of any score."""

    form: Form
    arguments: Sequence[Mapping[str, Any]] = ({},)


_TASKS: Final[Mapping[str, _Task]] = {
    "classification": _Task(Form((3, 224, 224))),
    "segmentation": _Task(Form((3, 224, 224))),
    "detection": _Task(
        Form((3, 224, 256), listed=True),
        (
            {"min_size": 224, "box_score_thresh": 0.0},
            {"min_size": 224, "score_thresh": 0.0},
            {"score_thresh": 0.0},
        ),
    ),
    "video": _Task(Form((3, 16, 112, 112))),
    "optical_flow": _Task(Form((3, 128, 128), count=2)),
}


def library_of(spec: str) -> Literal["timm", "torchvision", "python"]:
    """ "timm", "torchvision" or "python", as `growfx.create_model` reads the name."""
    if spec.startswith(_TORCHVISION):
        return "torchvision"
    return "python" if ":" in spec else "timm"


def model_names(pattern: str = "*", library: str | None = None) -> list[str]:
    """Names of all architectures of timm and torchvision (quantized ones excluded) that a glob pattern matches.

    torchvision's are `torchvision/NAME`; the pattern may leave out the prefix. `package.module:callable` is itself.
    """
    if library_of(pattern) == "python":
        return [pattern] if library is None else []
    import timm
    from torchvision.models import list_models

    names = list(timm.list_models()) if library in (None, "timm") else []
    if library in (None, "torchvision"):
        names += [_TORCHVISION + name for name in list_models() if _task(name) != "quantization"]
    return sorted(n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.removeprefix(_TORCHVISION), pattern))


def family_of(spec: str) -> str:
    """The module that defines the model: timm's file, torchvision's task and file, else the Python module."""
    library = library_of(spec)
    if library == "timm":
        from timm.models import model_entrypoint

        return model_entrypoint(spec.split(".")[0]).__module__.rpartition(".")[2]
    if library == "torchvision":
        from torchvision.models import get_model_builder

        name = spec.removeprefix(_TORCHVISION)
        return f"{_task(name)}/{get_model_builder(name).__module__.rpartition('.')[2]}"
    return spec.partition(":")[0]


def identity_of(spec: str, arguments: Mapping[str, Any]) -> ModelIdentity:
    """How the model is built with these arguments."""
    return ModelIdentity(library_of(spec), spec.removeprefix(_TORCHVISION), dict(arguments))


def arguments_of(spec: str) -> dict[str, Any]:
    """Keyword arguments to build the model with: those of its task that its builder takes."""
    if library_of(spec) != "torchvision":
        return {}
    from growfx.errors import ConfigError

    choices = _TASKS[_task(spec.removeprefix(_TORCHVISION))].arguments
    for arguments in choices:
        if len(choices) == 1:
            break
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                create_model(spec, **arguments)
        except ConfigError:
            continue
        return dict(arguments)
    return {}


def forms(spec: str, model: nn.Module) -> list[Form]:
    """Forms of input to try, the likeliest first."""
    if library_of(spec) != "torchvision":
        return [Form(default_input_shape(model)[1:])]
    name = spec.removeprefix(_TORCHVISION)
    form = _TASKS[_task(name)].form
    size = _published_size(name)
    return [form] if size is None or size == form.shape[-2:] else [form, form.sized(*size)]


def _task(name: str) -> str:
    from torchvision.models import get_model_builder

    parts = get_model_builder(name).__module__.split(".")
    return parts[2] if len(parts) > 3 else "classification"


def _published_size(name: str) -> tuple[int, int] | None:
    """Height and width that the model's published weights were made for."""
    from torchvision.models import get_model_weights

    size = getattr(get_model_weights(name)["DEFAULT"].transforms(), "crop_size", None)
    return None if not size else (int(size[0]), int(size[-1]))
