"""What files of an image folder are taken as images, of which class, and with which values."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from error_facts import facts
from PIL import Image

from growfx.data.loaders import InputFormat, make_loader
from growfx.data.sources import open_data
from growfx.errors import DataError, GrowfxWarning
from growfx.options import DataOptions

GREY = np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8)
PLAIN = InputFormat((1, 8, 8), (0.0,), (1.0,))


def put(path: Path, pixels: np.ndarray = GREY) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(2):
                put(tmp_path / split / name / f"{i}.png")
    return tmp_path


def classes_of(folder: Path, split: str = "train") -> dict[str, str]:
    """The class of each file, by its path below the split."""
    source = open_data(str(folder))
    root = folder / split
    samples = source.splits[split].images.samples
    return {Path(path).relative_to(root).as_posix(): source.classes[target] for path, target in samples}


@pytest.mark.parametrize("inner", ["monday/2.png", "dog/2.png", "a/b/2.png", "cat/2.png"])
def test_an_image_belongs_to_the_class_folder_it_lies_in_however_deep(folder, inner):
    put(folder / "train" / "cat" / inner)
    assert classes_of(folder) == {
        "cat/0.png": "cat",
        "cat/1.png": "cat",
        f"cat/{inner}": "cat",
        "dog/0.png": "dog",
        "dog/1.png": "dog",
    }


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tif", "TIFF", "ppm", "pgm", "PNG", "JPEG"])
def test_images_of_every_usual_format_are_taken(folder, suffix):
    put(folder / "val" / "dog" / f"2.{suffix}")
    assert classes_of(folder, "val")[f"dog/2.{suffix}"] == "dog"


def test_hidden_folders_and_files_that_are_not_images_are_passed_over_in_silence(folder):
    put(folder / "train" / "cat" / ".thumbs" / "0.png")
    (folder / "train" / "cat" / "labels.txt").write_text("cat")
    (folder / "train" / "readme.md").write_text("two classes")
    assert len(classes_of(folder)) == 4


@pytest.mark.parametrize("place", ["train/loose.png", "train/cat/moving.gif"])
def test_images_that_are_left_out_are_counted_and_named(folder, place):
    put(folder / place)
    with pytest.warns(GrowfxWarning, match=facts(1, str(folder / place))):
        assert len(classes_of(folder)) == 4


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_an_image_of_16_bits_is_the_one_of_8_bits_at_its_brightness(folder, suffix):
    put(folder / "val" / "cat" / f"0.{suffix}", GREY.astype(np.uint16) * 257)
    put(folder / "val" / "cat" / "1.png")
    for name in ("dog/0.png", "dog/1.png", "cat/0.png"):
        if name != f"cat/0.{suffix}":
            (folder / "val" / name).unlink()
    images, _ = next(iter(make_loader(open_data(str(folder)), "val", PLAIN, DataOptions())))
    assert torch.equal(images[0], images[1])
    assert torch.allclose(images[0, 0], torch.from_numpy(GREY) / 255)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_images_whose_range_is_not_known_are_refused_by_name(folder, kind):
    put(folder / "train" / "cat" / "2.tif", GREY.astype(kind))
    with pytest.raises(DataError, match=facts(1, 5, "2.tif", "16 bits")):
        open_data(str(folder))


def test_data_of_other_files_has_another_fingerprint_wherever_it_lies(folder, tmp_path_factory):
    before = open_data(str(folder)).fingerprint
    elsewhere = tmp_path_factory.mktemp("moved") / "data"
    shutil.copytree(folder, elsewhere)
    assert open_data(str(elsewhere)).fingerprint == before
    image = elsewhere / "train" / "cat" / "0.png"
    put(image, np.zeros_like(GREY))
    other = open_data(str(elsewhere)).fingerprint
    image.rename(image.with_name("9.png"))
    assert len({before, other, open_data(str(elsewhere)).fingerprint}) == 3


def test_the_order_of_files_is_that_of_their_names_whatever_the_folder_lists(folder, monkeypatch):
    for name in ("01.png", "1.PNG", "001.png"):
        put(folder / "train" / "cat" / name)
    there, walk = list(classes_of(folder)), os.walk

    def backwards(*args, **options):
        for place, below, files in walk(*args, **options):
            below.reverse()
            yield place, below, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert list(classes_of(folder)) == there


@pytest.mark.parametrize("links", [{"cat/loop": ".."}, {"cat/a/b": "../c", "cat/c/d": "../a"}])
def test_links_in_a_circle_add_no_image(folder, links):
    for name, target in links.items():
        link = folder / "train" / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(target, target_is_directory=True)
    expected = {f"{name}/{i}.png": name for name in ("cat", "dog") for i in range(2)}
    assert classes_of(folder) == expected


def test_a_link_to_a_folder_of_images_is_followed(folder, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    put(store / "5.png")
    (folder / "train" / "dog" / "more").symlink_to(store, target_is_directory=True)
    assert classes_of(folder)["dog/more/5.png"] == "dog"


def test_the_orientation_that_a_camera_noted_is_not_applied_as_by_torchvision(folder):
    from torchvision.datasets import ImageFolder

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(GREY[:4]).save(folder / "train" / "cat" / "turned.jpg", exif=exif)
    ours, theirs = open_data(str(folder)).splits["train"], ImageFolder(str(folder / "train"))
    sizes = [ours.images[i][0].size for i in range(len(ours))]
    assert sizes == [theirs[i][0].size for i in range(len(theirs))]
    assert (8, 4) in sizes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16"])
def test_images_of_other_modes_are_read(folder, mode):
    Image.new(mode, (8, 8)).save(folder / "train" / "cat" / "other.tif")
    images, _ = next(iter(make_loader(open_data(str(folder)), "train", PLAIN, DataOptions(augment="none"))))
    assert images.shape[1:] == PLAIN.input_size


def test_images_too_large_for_pillow_are_refused_by_name(folder, monkeypatch):
    put(folder / "train" / "cat" / "large.png", np.zeros((40, 40), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DataError, match=facts(1, 5, "large.png", "1,000", "MAX_IMAGE_PIXELS")):
        open_data(str(folder))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert len(open_data(str(folder)).split("train")) == 5


@pytest.mark.parametrize("change", ["removed", "grown"])
def test_an_image_that_changed_since_the_start_is_named_when_it_is_read(folder, monkeypatch, change):
    loader = make_loader(open_data(str(folder)), "val", PLAIN, DataOptions(cache_mb=0))
    path = folder / "val" / "dog" / "1.png"
    if change == "removed":
        path.unlink()
    else:
        put(path, np.zeros((40, 40), np.uint8))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DataError, match=facts(str(path))):
        list(loader)
