"""Warn of data options that were given and have no effect on the data set that is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from growfx.data.loaders import is_augmented
from growfx.data.sources import DataSource
from growfx.notices import warn_once
from growfx.options import DataOptions, Unused, unused_options

__all__ = ["Reading", "unused_in", "warn_of_unused"]


@dataclass(frozen=True)
class Reading:
    """What is read: what the rows of the table are asked about.

    Attributes:
        source: the data set.
        options: of reading it.
        split: the only split that is read; None where a run trains on the data.
    """

    source: DataSource
    options: DataOptions
    split: str | None = None


def _plain(reading: Reading) -> str:
    if reading.split is not None:
        return "in an evaluation, which leaves images as they are"
    if is_augmented(reading.source, reading.options):
        return ""
    return (
        f"with `augment` = `{reading.options.augment}`, which leaves the images of `{reading.source.spec}` as they are"
    )


def _own_colours(reading: Reading) -> str:
    policy = reading.options.auto_augment
    return f"beside `auto_augment` = `{policy}`, which changes colours itself" if policy and "3a" not in policy else ""


def _fixed(option: str) -> Unused:
    def reason(reading: Reading) -> str:
        source = reading.source
        if option not in source.depends_on:
            return f"on `{source.spec}`, whose splits do not depend on it"
        held_out = "val_fraction" in source.depends_on  # from the training images, the test images stay
        return "on the split `test`, from which nothing is held out" if held_out and reading.split == "test" else ""

    return Unused((option,), reason)


def _not_fetched(reading: Reading) -> str:
    there = "data_dir" in reading.source.depends_on
    return "" if there else f"on `{reading.source.spec}`, which is not a data set of timm, such as `torch/cifar10`"


def _not_kept(reading: Reading) -> str:
    if reading.split is not None:
        return "in an evaluation, which reads every image once"
    if not reading.source.decodes:
        return f"on `{reading.source.spec}`, which is not a folder of image files"
    workers = reading.options.workers
    return f"with `workers` = {workers}: loading processes end with their epoch, and keep no images" if workers else ""


def _evaluating(reading: Reading) -> str:
    return "" if reading.split is None else _plain(reading)


TABLE: Final = (
    Unused(("augment",), _evaluating),
    Unused(("crop_scale", "hflip", "color_jitter", "auto_augment", "random_erase"), _plain),
    Unused(("color_jitter",), _own_colours),
    _fixed("val_fraction"),
    _fixed("split_seed"),
    Unused(("data_dir", "download"), _not_fetched),
    Unused(("cache_mb",), _not_kept),
)


def unused_in(given: Mapping[str, Any], reading: Reading) -> dict[str, str]:
    """Return a message for each of the options `given` that has no effect."""
    return unused_options(given, TABLE, reading)


def warn_of_unused(given: Mapping[str, Any], reading: Reading) -> None:
    """Warn of each of the options `given` that has no effect."""
    for message in dict.fromkeys(unused_in(given, reading).values()):
        warn_once(message, [])
