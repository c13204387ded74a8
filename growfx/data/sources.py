"""Open a DATA spec as an image data set with fixed train, validation and test splits.

A spec is `digits` (scikit-learn's bundled 8x8 digits), a folder with `train/` and `val/` or `test/` of class
folders, or one of timm's map-style specs such as `torch/cifar10`. Reading is timm's
(`timm.data.create_dataset`); what is added is a fixed hold-out where there is no validation split, and refusal
of data that would train silently wrong. Pixels are taken as stored: the orientation that EXIF tells is not applied, as
it is not by timm and torchvision's `ImageFolder`. `growfx.data.loaders` makes loaders of it.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from growfx.data.kept import KeptImages
from growfx.errors import DataError, did_you_mean
from growfx.notices import warn_once
from growfx.options import DataOptions

__all__ = ["DataSource", "Split", "open_data"]

# Where timm's names for torchvision data sets have their evaluation images: called test when held back from
# training by the authors under that name, else val.
_TORCH_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_TORCH_VAL = ("imagenet", "places365", "inaturalist", "inat")
# Data options that data sets by a name depend on, and those whose validation images are held out.
_PLACE, _HOLD_OUT = ("data_dir", "download"), ("val_fraction", "split_seed")
# Names of files that are images; torchvision's `ImageFolder` has the same.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


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
        depends_on: names of the data options that say where it lies and how it is split.
    """

    spec: str
    classes: tuple[str, ...]
    native_size: int
    splits: Mapping[str, Split] = field(repr=False)
    grey: bool = False
    depends_on: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Sizes of the splits and a digest of class names, hold-out, and names and sizes of files: the same for the
        same data, wherever it lies.
        """
        text = hashlib.sha256("\n".join(self.classes).encode())
        for name, split in sorted(self.splits.items()):
            text.update(name.encode() + np.asarray(split.indices, dtype="<i8").tobytes())
            text.update(getattr(split.images, "digest", "").encode())
        sizes = " ".join(f"{name}:{len(split)}" for name, split in sorted(self.splits.items()))
        return f"{sizes} {text.hexdigest()[:16]}"

    @property
    def decodes(self) -> bool:
        """Whether its images are files, which are decoded whenever they are not kept in memory."""
        return any(isinstance(split.images, _FileImages) for split in self.splits.values())

    def split(self, name: str) -> Split:
        """The split of that name; DataError when the data set has none."""
        if name not in self.splits:
            present = ", ".join(f"`{n}`" for n in self.splits)
            raise DataError(f"`{self.spec}` has no `{name}` split; it has {present}")
        return self.splits[name]


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
    specs = [f"torch/{name}" for name in (*_TORCH_TEST, *_TORCH_VAL)]
    listed = ", ".join(f"`{name}`" for name in specs)
    raise DataError(
        f"data `{spec}` was not found; expected `digits`, a folder with `train/` and `val/` or `test/` of "
        f"class folders, or a timm spec among {listed}{did_you_mean(spec, ['digits', *specs])}"
    )


@dataclass(frozen=True)
class _FileImages:
    """Images in files.

    timm's own data set replaces an unreadable image by its neighbour; this one names it.

    Attributes:
        samples: (path, class number) of every image.
        digest: of the names and sizes of the files.
        kept: decoded images by path, shared by the splits of a data set.
    """

    samples: Sequence[tuple[str, int]] = field(repr=False)
    digest: str
    kept: KeptImages = field(repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        return self.kept.get(path, self._decode), target

    @staticmethod
    def _decode(path: str) -> Any:
        from PIL import Image

        try:
            with Path(path).open("rb") as stream:
                image = Image.open(stream)
                image.load()
        except FileNotFoundError as error:
            raise DataError(f"image `{path}` is no longer there; put it back, or start anew without it") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"image `{path}` cannot be decoded ({error}); remove or replace it") from error
        return _eight_bits(image)


def _depth(image: Any) -> int | None:
    """Bits of a value of an image (PIL), from its header; None where the range of its values is not known."""
    if image.mode.startswith("I;16"):
        return 16
    if image.mode == "I":  # how PIL reads 16 bits from some formats, and signed or 32 bits from others
        return 16 if image.format in ("PNG", "PPM") else None
    return None if image.mode == "F" else 8


def _eight_bits(image: Any) -> Any:
    """An image with 8 bits a value; PIL's own conversion cuts deeper ones off at 255, which leaves them white."""
    from PIL import Image

    if _depth(image) != 16:
        return image
    values = np.asarray(image).astype(np.float64) / (65535 / 255)
    return Image.fromarray(np.rint(values).astype(np.uint8))


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
        raise DataError("`digits` needs scikit-learn; install it with `pip install scikit-learn`") from error
    bunch = cast(Any, load_digits())
    images = _DigitImages(bunch.images, bunch.target)
    targets = bunch.target.tolist()
    rest, test = _hold_out(targets, range(len(targets)), 0.2, options.split_seed)
    train, val = _hold_out(targets, rest, 0.25, options.split_seed + 1)
    parts = {"train": Split(images, train), "val": Split(images, val), "test": Split(images, test)}
    return DataSource("digits", tuple(str(d) for d in range(10)), 8, parts, grey=True, depends_on=("split_seed",))


def _open_folder(spec: str, options: DataOptions) -> DataSource:
    root = Path(spec)
    folders = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if "train" not in folders or len(folders) == 1:
        found = ", ".join(sorted(f"`{p.name}`" for p in root.iterdir())[:8]) or "nothing"
        raise DataError(f"folder `{spec}` holds {found}; it needs `train/` and one of `val/` and `test/`")
    classes = _class_folders(folders["train"])
    if len(classes) < 2:
        raise DataError(
            f"`{folders['train']}` has {len(classes)} class folders; it needs two or more, each with its images"
        )
    for folder in folders.values():
        unknown = sorted(set(_class_folders(folder)) - set(classes))
        if unknown:
            names = ", ".join(f"`{n}`" for n in unknown[:5])
            raise DataError(
                f"`{folder}` has {len(unknown)} classes that `train/` does not have: {names}; "
                f"`train/` has {len(classes)}"
            )
    kept = KeptImages(0 if options.workers else options.cache_mb)  # loading processes keep none
    splits = {name: _read_folder(folder, classes, kept) for name, folder in folders.items()}
    targets = [target for _, target in splits["train"].images.samples]
    return _finish(spec, tuple(classes), splits, targets, options)


def _class_folders(folder: Path) -> list[str]:
    from timm.utils.misc import natural_key

    names = (p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return sorted(names, key=natural_key)


def _read_folder(folder: Path, classes: Sequence[str], kept: KeptImages) -> Split:
    samples = _find_images(folder, classes)
    if not samples:
        raise DataError(
            f"`{folder}` has no images in its class folders; they are files whose names end in {_listed(_SUFFIXES)}"
        )
    if folder.name == "train":
        empty = sorted(set(range(len(classes))) - {target for _, target in samples})
        if empty:
            names = ", ".join(f"`{classes[i]}`" for i in empty[:5])
            raise DataError(f"`{folder}` has class folders without images: {names}; fill or remove them")
    paths = [path for path, _ in samples]
    _check_headers(paths, folder)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{Path(path).relative_to(folder).as_posix()}\0{os.path.getsize(path)}\n".encode())
    images = _FileImages(samples, digest.hexdigest(), kept)
    return Split(images, tuple(range(len(images))))


def _find_images(folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """The image files of a split and their class numbers, in the order of their names.

    An image belongs to the class folder it lies in, however deep; the folders between them mean nothing. Links to
    folders are followed, but not back to one that contains them. Images that are left out are warned of.
    """
    from PIL import Image
    from timm.utils.misc import natural_key

    Image.init()
    samples: list[tuple[str, int]] = []
    left = [path for path in folder.iterdir() if path.is_file() and _suffix(path.name) in _SUFFIXES]
    for number, name in enumerate(classes):
        for place, below, files in os.walk(folder / name, followlinks=True):
            below[:] = [inner for inner in below if not inner.startswith(".") and not _leads_up(place, inner)]
            for file in files:
                if _suffix(file) in _SUFFIXES:
                    samples.append((os.path.join(place, file), number))
                elif _suffix(file) in Image.EXTENSION:
                    left.append(Path(place, file))
    if left:
        names = ", ".join(f"`{path}`" for path in sorted(left)[:3])
        warn_once(
            f"{len(left)} images under `{folder}` are left out: {names}; images lie in class folders, in files whose "
            f"names end in {_listed(_SUFFIXES)}",
            [],
        )
    # Names that differ in case or leading zeros alone are alike to `natural_key`.
    return sorted(samples, key=lambda sample: (natural_key(sample[0]), sample[0]))


def _leads_up(place: str, inner: str) -> bool:
    """Whether a folder is a link to one that it lies in, or that a link on the way to it leads to."""
    path = Path(place, inner)
    if not path.is_symlink():
        return False
    target = path.resolve()
    return any(above.resolve().is_relative_to(target) for above in path.parents)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _check_headers(paths: Sequence[str], folder: Path) -> None:
    """Open every file before training starts: a bad one would otherwise end a run hours later."""
    from PIL import Image

    bad, unbounded, large = list[str](), list[str](), list[str]()
    for path in paths:
        try:
            with Image.open(path) as image:
                if _depth(image) is None:
                    unbounded.append(path)
        except Image.DecompressionBombError:
            large.append(path)
        except (OSError, SyntaxError, ValueError):
            bad.append(path)
    if bad:
        raise DataError(
            f"{len(bad)} of {len(paths)} images under `{folder}` cannot be read: {_listed(bad[:3])}; remove or replace "
            "them"
        )
    if large:
        raise DataError(
            f"{len(large)} of {len(paths)} images under `{folder}` have more pixels than Pillow reads, "
            f"{2 * (Image.MAX_IMAGE_PIXELS or 0):,}: {_listed(large[:3])}; make them smaller, or call growfx from "
            "Python with a larger `PIL.Image.MAX_IMAGE_PIXELS`"
        )
    if unbounded:
        raise DataError(
            f"{len(unbounded)} of {len(paths)} images under `{folder}` have values of 32 bits, whose range is not "
            f"known: {_listed(unbounded[:3])}; convert them to 8 or 16 bits"
        )


def _open_torchvision(spec: str, name: str, options: DataOptions) -> DataSource:
    from timm.data.dataset_factory import create_dataset

    if name not in (*_TORCH_TEST, *_TORCH_VAL):
        specs = [f"torch/{known}" for known in (*_TORCH_TEST, *_TORCH_VAL)]
        allowed = ", ".join(f"`{known}`" for known in specs)
        raise DataError(f"data `{spec}` is unknown; allowed: {allowed}{did_you_mean(spec.lower(), specs)}")
    splits: dict[str, Split] = {}
    for mine, theirs in (("train", "train"), ("test" if name in _TORCH_TEST else "val", "validation")):
        try:
            images = create_dataset(f"torch/{name}", root=options.data_dir, split=theirs, download=options.download)
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"`{spec}` was not found in `{options.data_dir}` ({reason}); "
                "set `data_dir`, or `download=true` to fetch it"
            ) from error
        splits[mine] = Split(images, tuple(range(len(cast(Any, images)))))
    targets = [int(t) for t in splits["train"].images.targets]
    names = tuple(str(c) for c in splits["train"].images.classes)
    return _finish(spec, names, splits, targets, options, _PLACE)


def _finish(
    spec: str,
    classes: tuple[str, ...],
    splits: dict[str, Split],
    targets: list[int],
    options: DataOptions,
    depends_on: tuple[str, ...] = (),
) -> DataSource:
    if "val" not in splits:
        depends_on += _HOLD_OUT
        train = splits["train"]
        kept, held = _hold_out(targets, range(len(targets)), options.val_fraction, options.split_seed)
        splits = {**splits, "train": Split(train.images, kept), "val": Split(train.images, held)}
    return DataSource(spec, classes, _native_size(splits["train"]), splits, depends_on=depends_on)


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
                f"class number {label} has one training image; holding out a validation split needs two a class"
            )
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        held += generator.permutation(members)[:count].tolist()
    away = set(held)
    return tuple(int(i) for i in chosen if int(i) not in away), tuple(sorted(held))


def _native_size(split: Split) -> int:
    spread = np.linspace(0, len(split) - 1, min(16, len(split))).astype(int)
    return max(min(split.images[split.indices[i]][0].size) for i in spread)
