"""Image data: a DATA spec becomes train, validation and test loaders.

A spec is `digits` (scikit-learn's bundled 8x8 digits), a folder with `train/` and `val/` or `test/` of class
folders, or one of timm's map-style specs such as `torch/cifar10`. Reading, transforms and batching are
timm's (`timm.data.create_dataset`, `create_loader`); what is added here is a fixed hold-out where there is
no validation split, and refusal of data that would train silently wrong.

Shuffling and augmentation draw from torch's, numpy's and python's global generators, which
`growfx.training` seeds at the start of every epoch: the order is a function of seed and epoch alone.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from torch.utils.data import DataLoader, Dataset

from growfx.errors import ConfigError, DataError
from growfx.models import default_input_shape
from growfx.options import DataOptions

__all__ = ["DataSource", "InputFormat", "Split", "fit_input", "make_loader", "open_data"]

# Where timm's names for torchvision data sets have their evaluation images: called test when held back from
# training by the authors under that name, else val.
_TORCH_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_TORCH_VAL = ("imagenet", "places365", "inaturalist", "inat")
# Mean and standard deviation of the digits' pixels, scaled to [0, 1].
_DIGITS_MEAN, _DIGITS_STD = 0.305, 0.376
_IMAGE_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Split:
    """Part of a data set: `images[i]` for i in `indices` gives (PIL image, class number)."""

    images: Any
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class DataSource:
    """An opened data set.

    Attributes:
        spec: as given by the user.
        classes: names, in the order of the class numbers.
        native_size: shorter side of the images in pixels (largest of a few).
        splits: "train", "val" and, where the data has one, "test".
        grey: statistics of one-channel digits apply, not those of photographs.
    """

    spec: str
    classes: tuple[str, ...]
    native_size: int
    splits: Mapping[str, Split] = field(repr=False)
    grey: bool = False

    @property
    def fingerprint(self) -> str:
        """Sizes of the splits and a digest of class names and hold-out: the same for the same data."""
        text = hashlib.sha256("\n".join(self.classes).encode())
        for name, split in sorted(self.splits.items()):
            text.update(name.encode() + np.asarray(split.indices, dtype="<i8").tobytes())
        sizes = " ".join(f"{name}:{len(split)}" for name, split in sorted(self.splits.items()))
        return f"{sizes} {text.hexdigest()[:16]}"

    def split(self, name: str) -> Split:
        """The split of that name; DataError when the data set has none."""
        if name not in self.splits:
            present = ", ".join(f"`{n}`" for n in self.splits)
            raise DataError(f"`{self.spec}` has no `{name}` split; it has {present}")
        return self.splits[name]


@dataclass(frozen=True)
class InputFormat:
    """How an image enters the model: (C, H, W), then (x - mean) / std per channel of values in [0, 1].

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


def open_data(spec: str, options: DataOptions | None = None) -> DataSource:
    """Find the images of a DATA spec and fix their splits; reads no pixels yet.

    Raises:
        DataError: nothing there, no class folders, unreadable images, classes in an evaluation split that
            training does not have, a missing package.
    """
    options = options or DataOptions()
    if spec == "digits":
        return _open_digits(options)
    prefix, slash, name = spec.partition("/")
    if slash and prefix.lower() == "torch" and not Path(spec).is_dir():
        return _open_torchvision(spec, name.lower(), options)
    if Path(spec).is_dir():
        return _open_folder(spec, options)
    specs = ", ".join(f"`torch/{name}`" for name in (*_TORCH_TEST, *_TORCH_VAL))
    raise DataError(
        f"data `{spec}` is not there; allowed: `digits`, a folder with `train/` and `val/` or `test/` of "
        f"class folders, or a timm spec among {specs}"
    )


def fit_size(native: int, model_size: int) -> int:
    """The image size to train at: the images' own, rounded up to a multiple of 32, at most the model's."""
    return min(model_size, max(32, math.ceil(native / 32) * 32))


def fit_input(source: DataSource, model: nn.Module, options: DataOptions) -> InputFormat:
    """How images of `source` enter `model`: its channels, its statistics, a size that fits both.

    Raises:
        DataError: the model takes neither one nor three channels.
        ConfigError: `img_size` differs from the one size a fixed-size model was built for.
    """
    _, channels, height, width = default_input_shape(model)
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

    Args:
        train: shuffle, augment and drop the last incomplete batch.

    Raises:
        DataError: no such split; while iterating, an image that cannot be decoded, by its name.
    """
    from timm.data.loader import create_loader

    part = source.split(split)
    images = _Images(part, _IMAGE_MODES[form.input_size[0]])
    kind = options.augment
    crop = train and (kind == "crop" or (kind == "auto" and not source.grey))
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
        batch_size=min(options.batch_size, len(part)),
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
        pin_memory=pin_memory,
    )
    return cast(DataLoader[Any], loader)


class _Images(Dataset[Any]):
    """A split as a torch data set; timm's create_loader sets `transform`."""

    def __init__(self, split: Split, mode: str) -> None:
        self.split, self.mode = split, mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        image, target = self.split.images[self.split.indices[position]]
        image = image.convert(self.mode)
        return self.transform(image) if self.transform else image, int(target)


class _ReaderImages:
    """Images of a timm reader. timm's own data set replaces an unreadable image by its neighbour; this
    one names it.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        stream, target = self.reader[index]
        with stream:
            try:
                image = Image.open(stream)
                image.load()
            except (OSError, SyntaxError, ValueError) as error:
                name = self.reader.filename(index, absolute=True)
                raise DataError(
                    f"image `{name}` cannot be decoded ({error}); remove or replace it"
                ) from error
        return image, target


class _DigitImages:
    """scikit-learn's digits as grey 8x8 images with values 0 to 255."""

    def __init__(self, pixels: np.ndarray, targets: np.ndarray) -> None:
        self.pixels = np.rint(pixels * (255 / 16)).astype(np.uint8)
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.fromarray(self.pixels[index]), int(self.targets[index])


def _open_digits(options: DataOptions) -> DataSource:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("`digits` needs scikit-learn; install it with `pip install growfx[demo]`") from error
    bunch = cast(Any, load_digits())
    images = _DigitImages(bunch.images, bunch.target)
    targets = bunch.target.tolist()
    rest, test = _hold_out(targets, range(len(targets)), 0.2, options.split_seed)
    train, val = _hold_out(targets, rest, 0.25, options.split_seed + 1)
    parts = {"train": Split(images, train), "val": Split(images, val), "test": Split(images, test)}
    return DataSource("digits", tuple(str(d) for d in range(10)), 8, parts, grey=True)


def _open_folder(spec: str, options: DataOptions) -> DataSource:
    root = Path(spec)
    folders = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if "train" not in folders or len(folders) == 1:
        found = ", ".join(sorted(f"`{p.name}`" for p in root.iterdir())[:8]) or "nothing"
        raise DataError(f"folder `{spec}` holds {found}; it needs `train/` and one of `val/` and `test/`")
    classes = _class_folders(folders["train"])
    if len(classes) < 2:
        raise DataError(
            f"`{folders['train']}` has {len(classes)} class folders; it needs two or more, each with "
            "its images"
        )
    for folder in folders.values():
        unknown = sorted(set(_class_folders(folder)) - set(classes))
        if unknown:
            names = ", ".join(f"`{n}`" for n in unknown[:5])
            raise DataError(
                f"`{folder}` has {len(unknown)} classes that `train/` does not have: {names}; "
                f"`train/` has {len(classes)}"
            )
    splits = {name: _read_folder(folder, classes) for name, folder in folders.items()}
    targets = [target for _, target in splits["train"].images.reader.samples]
    return _finish(spec, tuple(classes), splits, targets, options)


def _class_folders(folder: Path) -> list[str]:
    from timm.utils.misc import natural_key

    names = (p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return sorted(names, key=natural_key)


def _read_folder(folder: Path, classes: Sequence[str]) -> Split:
    from timm.data.dataset_factory import create_dataset

    numbers = {name: number for number, name in enumerate(classes)}
    try:
        reader = cast(Any, create_dataset("", root=str(folder), search_split=False, class_map=numbers)).reader
    except RuntimeError as error:
        raise DataError(f"`{folder}` has no images in its class folders ({error})") from error
    if folder.name == "train":
        empty = sorted(set(range(len(classes))) - {target for _, target in reader.samples})
        if empty:
            names = ", ".join(f"`{classes[i]}`" for i in empty[:5])
            raise DataError(f"`{folder}` has class folders without images: {names}; fill or remove them")
    _check_headers([path for path, _ in reader.samples], folder)
    images = _ReaderImages(reader)
    return Split(images, tuple(range(len(images))))


def _check_headers(paths: Sequence[str], folder: Path) -> None:
    """Open every file before training starts: a bad one would otherwise end a run hours later."""
    from PIL import Image

    bad = []
    for path in paths:
        try:
            Image.open(path).close()
        except (OSError, SyntaxError, ValueError):
            bad.append(path)
    if bad:
        names = ", ".join(f"`{path}`" for path in bad[:3])
        raise DataError(
            f"{len(bad)} of {len(paths)} images under `{folder}` cannot be read: {names}; "
            "remove or replace them"
        )


def _open_torchvision(spec: str, name: str, options: DataOptions) -> DataSource:
    from timm.data.dataset_factory import create_dataset

    if name not in (*_TORCH_TEST, *_TORCH_VAL):
        allowed = ", ".join(f"`torch/{n}`" for n in (*_TORCH_TEST, *_TORCH_VAL))
        raise DataError(f"data `{spec}` is unknown; allowed: {allowed}")
    splits: dict[str, Split] = {}
    for mine, theirs in (("train", "train"), ("test" if name in _TORCH_TEST else "val", "validation")):
        try:
            images = create_dataset(
                f"torch/{name}", root=options.data_dir, split=theirs, download=options.download
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"`{spec}` was not found in `{options.data_dir}` ({reason}); "
                "set `data_dir`, or `download=true` to fetch it"
            ) from error
        splits[mine] = Split(images, tuple(range(len(cast(Any, images)))))
    targets = [int(t) for t in splits["train"].images.targets]
    names = tuple(str(c) for c in splits["train"].images.classes)
    return _finish(spec, names, splits, targets, options)


def _finish(
    spec: str, classes: tuple[str, ...], splits: dict[str, Split], targets: list[int], options: DataOptions
) -> DataSource:
    if "val" not in splits:
        train = splits["train"]
        kept, held = _hold_out(targets, range(len(targets)), options.val_fraction, options.split_seed)
        splits = {**splits, "train": Split(train.images, kept), "val": Split(train.images, held)}
    return DataSource(spec, classes, _native_size(splits["train"]), splits)


def _hold_out(
    targets: Sequence[int], indices: Sequence[int], fraction: float, seed: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split `indices` in two, class by class: each class gives the same part, at least one, never all."""
    generator = np.random.Generator(np.random.Philox(seed))
    chosen = np.asarray(indices)
    labels = np.asarray(targets)[chosen]
    held: list[int] = []
    for label in np.unique(labels):
        members = chosen[labels == label]
        if len(members) < 2:
            raise DataError(
                f"class number {label} has one training image; holding out a validation split needs two "
                "a class"
            )
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        held += generator.permutation(members)[:count].tolist()
    away = set(held)
    return tuple(int(i) for i in chosen if int(i) not in away), tuple(sorted(held))


def _native_size(split: Split) -> int:
    spread = np.linspace(0, len(split) - 1, min(16, len(split))).astype(int)
    return max(min(split.images[split.indices[i]][0].size) for i in spread)


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
