"""Fit images to a model (size, channels, normalization), and make loaders with timm's transforms.

Shuffling and augmentation draw from torch's, numpy's and python's global generators, which
`growfx.training` seeds at the start of every epoch: the order is a function of seed and epoch alone. Loading processes
draw for each image from the epoch's seed and the image's number.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import nn
from torch.utils.data import DataLoader

from growfx.data.batches import SampleSeeded
from growfx.data.collate import normalize_by_batch
from growfx.data.sources import DataSource, Split
from growfx.distributed import ranks
from growfx.errors import ConfigError, DataError
from growfx.models.build import default_image_shape
from growfx.options import DataOptions

__all__ = ["InputFormat", "fit_input", "fit_size", "is_augmented", "is_shared_out", "make_loader", "sampler_of"]

# Mean and standard deviation of the digits' pixels, scaled to [0, 1].
_DIGITS_MEAN, _DIGITS_STD = 0.305, 0.376
_IMAGE_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class InputFormat:
    """The model's input: (C, H, W), then (x - mean) / std per channel of values in [0, 1].

    `crop_pct` is the part of the resized image that evaluation keeps, as in timm.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0

    def as_json(self) -> dict[str, Any]:
        """As a dictionary that JSON can hold; `InputFormat.from_json` reads it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "InputFormat":
        """The inverse of `as_json`; DataError when a key is missing."""
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**fields)
        except TypeError as error:
            raise DataError(f"the recorded input format {dict(values)} is not readable ({error})") from error


def fit_size(native: int, model_size: int) -> int:
    """The image size to train at: the images' own, rounded up to a multiple of 32, at most the model's."""
    return min(model_size, max(32, math.ceil(native / 32) * 32))


def fit_input(source: DataSource, model: nn.Module, options: DataOptions) -> InputFormat:
    """Return the input format for images of `source` in `model`: channels, statistics, and a size that fits both.

    Raises:
        DataError: the model takes neither one nor three channels.
        ConfigError: `img_size` differs from the one size a fixed-size model was built for.
    """
    channels, height, width = default_image_shape(model)
    if channels not in _IMAGE_MODES:
        raise DataError(f"the model takes {channels} input channels; images have 1 (grey) or 3 (colour)")
    config = _pretrained_config(model)
    if config.get("fixed_input_size"):
        size = (height, width)
        if options.img_size not in (None, height):
            raise ConfigError(
                f"`img_size` = {options.img_size}, but the model was built for {height}x{width} pixels; "
                f"build it with `model.img_size={options.img_size}`"
            )
    else:
        side = options.img_size or fit_size(source.native_size, height)
        size = (side, side)
    mean, std = _statistics(source, config, channels)
    smaller = source.native_size <= min(size)
    crop = 1.0 if smaller else float(config.get("crop_pct") or 0.875)
    # Bilinear: bicubic overshoots on tiny images that are enlarged several times.
    method = "bilinear" if smaller else str(config.get("interpolation") or "bicubic")
    return InputFormat((channels, *size), mean, std, method, crop)


def make_loader(
    source: DataSource,
    split: str,
    form: InputFormat,
    options: DataOptions,
    *,
    train: bool = False,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A loader of (float32 images (B, C, H, W), int64 classes (B)).

    Among several ranks each has its own part of the images, in as many batches as the others; a few images are repeated
    where the parts would differ.

    Args:
        train: shuffle, augment and drop the last incomplete batch.

    Raises:
        DataError: no such split; while iterating, an image that cannot be decoded, by its name.
    """
    from timm.data.loader import create_loader

    part = source.split(split)
    images = _Images(part, _IMAGE_MODES[form.input_size[0]])
    crop = train and is_augmented(source, options)
    policy: dict[str, Any] = {
        "scale": (options.crop_scale, 1.0),
        "hflip": options.hflip,
        "color_jitter": options.color_jitter,
        "auto_augment": options.auto_augment,
        "re_prob": options.random_erase,
    }
    loader = create_loader(
        cast(Any, images),
        input_size=form.input_size,
        batch_size=min(options.batch_size, max(1, len(part) // ranks.world_size())),
        is_training=train,
        no_aug=not crop,
        **(policy if crop else {}),
        interpolation=form.interpolation,
        mean=form.mean,
        std=form.std,
        crop_pct=form.crop_pct,
        num_workers=options.workers,
        # Workers that outlive an epoch would carry random state a resumed run does not have.
        persistent_workers=False,
        use_prefetcher=False,
        distributed=ranks.world_size() > 1,
        pin_memory=pin_memory,
    )
    made = cast(DataLoader[Any], loader)
    normalize_by_batch(made)
    return made


def is_augmented(source: DataSource, options: DataOptions) -> bool:
    """Whether training images of `source` are cropped and changed at random."""
    return options.augment == "crop" or (options.augment == "auto" and not source.grey)


class _Images(SampleSeeded):
    """A split as a torch data set; timm's create_loader sets `transform`."""

    def __init__(self, split: Split, mode: str) -> None:
        self.split, self.mode = split, mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.split)

    def load(self, position: int) -> tuple[Any, int]:
        """Return an image, transformed, and the number of its class."""
        image, target = self.split.images[self.split.indices[position]]
        if image.mode == "LAB":  # which Pillow converts to colours alone
            image = image.convert("RGB")
        image = image.convert(self.mode)
        return self.transform(image) if self.transform else image, int(target)


def _pretrained_config(model: nn.Module) -> Mapping[str, Any]:
    """timm's record of how a model's images are made; empty for models of others."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else {}


def _statistics(
    source: DataSource, config: Mapping[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    if source.grey:
        return (_DIGITS_MEAN,) * channels, (_DIGITS_STD,) * channels
    mean = tuple(config.get("mean") or IMAGENET_DEFAULT_MEAN)
    std = tuple(config.get("std") or IMAGENET_DEFAULT_STD)
    if len(mean) == channels:
        return mean, std
    return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels


def sampler_of(loader: object) -> object:
    """The sampler that orders a loader's images, in its `batch_sampler` or beside it; None where there is none."""
    inside = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return getattr(loader, "sampler", None) if inside is None else inside


def is_shared_out(sampler: object) -> bool:
    """Whether a loader's sampler shares the images out among all ranks: every rank takes each n-th."""
    from timm.data.distributed_sampler import OrderedDistributedSampler
    from torch.utils.data import DistributedSampler

    known = isinstance(sampler, DistributedSampler | OrderedDistributedSampler)
    return known and sampler.num_replicas == ranks.world_size()
