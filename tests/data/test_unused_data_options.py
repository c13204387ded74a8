"""Data options that have no effect on what is read are told of, and no others."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from growfx.commands.job import assemble
from growfx.data.kept import KeptImages
from growfx.data.sources import DataSource, Split, _FileImages, open_data
from growfx.data.unused import TABLE, Reading, unused_in
from growfx.errors import GrowfxWarning
from growfx.options import DataOptions

NAMED = ("data_dir", "download")
HELD = ("val_fraction", "split_seed")
DIGITS = DataSource("digits", (), 8, {}, grey=True, depends_on=("split_seed",))
HELD_OUT = DataSource("folder", (), 8, {}, depends_on=HELD)
SPLIT = DataSource("folder", (), 8, {})
FILES = DataSource("folder", (), 8, {"train": Split(_FileImages([], "", KeptImages(1)), ())})
CIFAR = DataSource("torch/cifar10", (), 8, {}, depends_on=NAMED + HELD)

CHANGES = {"crop_scale": 0.3, "hflip": 0.1, "color_jitter": 0.4, "auto_augment": "rand-m9", "random_erase": 0.2}
PLACES: dict[str, Any] = {"data_dir": "elsewhere", "download": True}
PARTS: dict[str, Any] = {"val_fraction": 0.2, "split_seed": 3}

# What is read, the split of an evaluation (None: a run), the options given, and which of them are told of.
ROWS: list[tuple[DataSource, str | None, dict[str, Any], set[str]]] = [
    (DIGITS, None, CHANGES, set(CHANGES)),
    (DIGITS, None, {"hflip": 0.1, "augment": "crop"}, set()),
    (SPLIT, None, {"hflip": 0.1, "augment": "none"}, {"hflip"}),
    (SPLIT, None, CHANGES, {"color_jitter"}),
    (SPLIT, None, {"color_jitter": 0.4, "auto_augment": "3a"}, set()),
    (SPLIT, None, {"color_jitter": 0.4}, set()),
    (SPLIT, "test", {"hflip": 0.1, "augment": "none"}, {"hflip", "augment"}),
    (DIGITS, None, PARTS, {"val_fraction"}),
    (DIGITS, "test", PARTS, {"val_fraction"}),
    (HELD_OUT, None, PARTS, set()),
    (HELD_OUT, "val", PARTS, set()),
    (HELD_OUT, "test", PARTS, set(PARTS)),
    (SPLIT, None, PARTS, set(PARTS)),
    (SPLIT, None, PLACES, set(PLACES)),
    (CIFAR, None, PLACES | PARTS, set()),
    (DIGITS, None, {"batch_size": 4, "img_size": 16, "workers": 2}, set()),
    (FILES, None, {"cache_mb": 0}, set()),
    (FILES, None, {"cache_mb": 9, "workers": 2}, {"cache_mb"}),
    (FILES, "test", {"cache_mb": 9}, {"cache_mb"}),
    (DIGITS, None, {"cache_mb": 9}, {"cache_mb"}),
    (CIFAR, None, {"cache_mb": 9}, {"cache_mb"}),
]


@pytest.mark.parametrize(("source", "split", "given", "told"), ROWS)
def test_an_option_without_effect_is_told_of(source, split, given, told):
    messages = unused_in(given, Reading(source, DataOptions(**given), split))
    assert set(messages) == told
    assert all(" no effect " in message for message in messages.values())


@pytest.mark.parametrize("validation", [True, False])
def test_a_data_set_says_which_options_its_splits_depend_on(tmp_path, validation):
    for part in ("train", "val", "test")[:: 1 if validation else 2]:
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(10):
                Image.new("L", (4, 4), number).save(tmp_path / part / name / f"{number}.png")
    for spec in ("digits", str(tmp_path)):
        usual = open_data(spec)
        for name, value in PARTS.items():
            changed = open_data(spec, DataOptions(**{name: value}))
            assert (changed.fingerprint != usual.fingerprint) == (name in usual.depends_on), name


def test_a_run_is_told_of_data_options_without_effect():
    with pytest.warns(GrowfxWarning, match="`hflip` = 0.1 has no effect with `augment` = `auto`, .*`digits`"):
        assemble("resnet10t", "digits", DataOptions(hflip=0.1, img_size=32))


def test_the_table_names_options_that_there_are():
    assert {option for row in TABLE for option in row.options} <= set(DataOptions.__dataclass_fields__)
