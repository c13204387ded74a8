"""What the page of a network must know: how images become its input, its classes, and outputs to compare with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from growfx.data.loaders import InputFormat
from growfx.errors import ArtifactError, ConfigError

__all__ = [
    "class_names",
    "drawing_grain",
    "expected_output",
    "image_shape",
    "input_format",
    "is_drawable",
    "noise",
]

_CHANNELS = (1, 3)
_INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")  # those of picture.js
# Sides of the images of data sets that are far coarser than what the network was given.
_GRAINS = {"digits": 8}
_MOST_CLASSES = 1_000_000


def image_shape(inputs: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[int, int, int]:
    """(channels, height, width) of the one image that a network takes.

    Raises:
        ConfigError: it takes something else than a batch of grey or colour images.
    """
    alone = inputs[0] if len(inputs) == 1 and not keywords else None
    if isinstance(alone, Tensor) and alone.ndim == 4 and alone.is_floating_point() and alone.shape[1] in _CHANNELS:
        _, channels, height, width = alone.shape
        return int(channels), int(height), int(width)
    told = [f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in inputs if isinstance(x, Tensor)]
    raise ConfigError(
        f"the page gives a network one batch of images of 1 or 3 channels; this one takes {', '.join(told) or 'none'}"
        f"{' and keyword arguments' if keywords else ''}; use `growfx.export_native`"
    )


def input_format(shape: tuple[int, int, int], provenance: Mapping[str, Any], model: nn.Module) -> InputFormat:
    """How an image becomes the input: as recorded in training, else as the model states, else values in [0, 1].

    Raises:
        ArtifactError: what was recorded cannot be meant, or is another number of channels.
        DataError: it has other fields than an `InputFormat`.
    """
    recorded = provenance.get("input")
    if recorded is not None and not isinstance(recorded, Mapping):
        raise ArtifactError(f"the recorded input format is `{recorded!r:.100}`; expected a table of mean, std, ...")
    if recorded:
        form = InputFormat.from_json(recorded)
    else:
        config = getattr(model, "pretrained_cfg", None)
        config = config if isinstance(config, Mapping) else {}
        mean, std = tuple(config.get("mean") or ()), tuple(config.get("std") or ())
        if len(mean) != shape[0] or len(std) != shape[0]:
            mean, std = (0.0,) * shape[0], (1.0,) * shape[0]
        method, crop = config.get("interpolation") or "bilinear", config.get("crop_pct") or 1.0
        form = InputFormat(shape, mean, std, method, crop)
    _check_format(form, shape[0])
    # The network's own size: it may have been exported for another one than it was trained on.
    return InputFormat(shape, form.mean, form.std, form.interpolation, form.crop_pct)


def _check_format(form: InputFormat, channels: int) -> None:
    listed = isinstance(form.mean, tuple) and isinstance(form.std, tuple)
    numbers = (*form.mean, *form.std, form.crop_pct) if listed else ("none",)
    known = all(isinstance(value, Real) and math.isfinite(value) for value in numbers)
    if not known or {len(form.mean), len(form.std)} != {channels} or not 0 < form.crop_pct <= 1 or 0 in form.std:
        raise ArtifactError(
            f"the recorded input format (mean {form.mean}, std {form.std}, crop_pct {form.crop_pct}) does not fit a "
            f"network of {channels} channels; expected a mean and a std other than 0 for each, and crop_pct up to 1"
        )
    if form.interpolation not in _INTERPOLATIONS:
        raise ConfigError(
            f"the page cannot resize by `{form.interpolation}`; it can by {', '.join(_INTERPOLATIONS)}: "
            "export with `provenance` that records one of these"
        )


def is_drawable(form: InputFormat) -> bool:
    """Whether a grey drawing is a natural input: all channels are treated alike."""
    return len(set(form.mean)) == len(set(form.std)) == 1


def drawing_grain(provenance: Mapping[str, Any]) -> int | None:
    """Pixels that a side of a drawing is averaged to first, so that it is as coarse as the images of the training."""
    data = provenance.get("data")
    return _GRAINS.get(str(data.get("spec"))) if isinstance(data, Mapping) else None


def class_names(provenance: Mapping[str, Any], count: int) -> list[str]:
    """Names of the classes where they were recorded and are as many; else none, and classes have numbers."""
    data = provenance.get("data")
    names = data.get("classes") if isinstance(data, Mapping) else None
    return [str(name) for name in names] if isinstance(names, list) and len(names) == count else []


def noise(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Numbers in [-1, 1), a hash of their place: the same as `noise` of network.js makes."""
    bits = np.arange(1, count + 1, dtype=np.uint32) * np.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x85EBCA6B)
    bits ^= bits >> np.uint32(13)
    return ((bits >> np.uint32(8)).astype(np.float64) / 2**23 - 1).astype(np.float32)


def expected_output(model: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    """The scores of the classes for `noise`, on the CPU in float32: shape (classes,).

    Raises:
        ConfigError: the network gives something else than one row of scores for an image.
    """
    parameter = next(model.parameters(), torch.empty(0))
    image = torch.from_numpy(noise(math.prod(shape))).reshape(1, *shape).to(parameter)
    with torch.inference_mode():
        output = model(image)
    if not isinstance(output, Tensor) or output.ndim != 2 or not 0 < output.shape[1] <= _MOST_CLASSES:
        kind = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"the page shows the classes of an image, so it needs an output of shape (1, classes), got {kind}; use "
            "`growfx.export_native`"
        )
    return output[0].float().cpu()
