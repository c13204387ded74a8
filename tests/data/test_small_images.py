"""What makes epochs of small images cheap changes none of their values: kept images, normalization by batch."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from growfx.data import collate, kept, loaders
from growfx.data.loaders import InputFormat, make_loader
from growfx.data.sources import _FileImages, open_data
from growfx.options import DataOptions

PIXELS = 12 * 12 * 4  # bytes that PIL takes for one of the images


@pytest.fixture
def folder(tmp_path):
    generator = np.random.Generator(np.random.Philox(0))
    for split, count in (("train", 12), ("val", 5)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


@pytest.fixture
def decoded(monkeypatch):
    """How often each file was decoded."""
    counts = Counter[str]()
    decode = _FileImages._decode

    def counted(path: str) -> Image.Image:
        counts[path] += 1
        return decode(path)

    monkeypatch.setattr(_FileImages, "_decode", staticmethod(counted))
    return counts


def epochs(source, options: DataOptions, form: InputFormat, number: int = 3) -> list[list[Tensor]]:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm's transforms draw from it
    random.seed(0)
    loader = make_loader(source, "train", form, options, train=True)
    return [[*(images for images, _ in loader), *(targets for _, targets in loader)] for _ in range(number)]


COLOUR = InputFormat((3, 16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = InputFormat((1, 8, 8), (0.3,), (0.4,))


@pytest.mark.parametrize("form", [COLOUR, GREY])
@pytest.mark.parametrize(
    "options",
    [
        DataOptions(batch_size=4),
        DataOptions(batch_size=4, augment="none"),
        DataOptions(batch_size=4, color_jitter=0.3),
        DataOptions(batch_size=4, auto_augment="rand-m9-mstd0.5"),
        DataOptions(batch_size=4, random_erase=0.9),
        DataOptions(batch_size=4, workers=1),
    ],
)
def test_batches_are_those_of_images_normalized_one_by_one(folder, monkeypatch, form, options):
    source = open_data(str(folder), options)
    ours = epochs(source, options, form, 1)[0]
    monkeypatch.setattr(loaders, "normalize_by_batch", lambda loader: None)
    theirs = epochs(source, options, form, 1)[0]
    assert len(ours) == len(theirs) == 2 * (24 // 4)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


def test_a_transform_that_ends_otherwise_stays_as_it_is(folder):
    loader = make_loader(open_data(str(folder)), "val", COLOUR, DataOptions())
    assert isinstance(loader.collate_fn, collate.NormalizedBatch)
    for steps in ([transforms.ToTensor()], [transforms.Normalize([0.5], [0.5]), transforms.ToTensor()], []):
        loader.dataset.transform, kept = transforms.Compose(steps), loader.collate_fn
        collate.normalize_by_batch(loader)
        assert loader.collate_fn is kept
        assert loader.dataset.transform.transforms == steps


def test_an_image_is_decoded_once_for_all_epochs(folder, decoded):
    options = DataOptions(batch_size=4)
    source = open_data(str(folder), options)
    kept = epochs(source, options, COLOUR)
    assert set(decoded.values()) == {1}
    plain = DataOptions(batch_size=4, cache_mb=0)
    again = epochs(open_data(str(folder), plain), plain, COLOUR)
    assert min(decoded.values()) > 3
    for one, other in zip(chain(*kept), chain(*again), strict=True):
        assert torch.equal(one, other)


def test_no_more_images_are_kept_than_fit(folder, decoded):
    side = 300  # 360,000 bytes and something: two of them are less than a megabyte, three are more
    for path in sorted((folder / "train").rglob("*.png")):
        Image.new("RGB", (side, side), (1, 2, 3)).save(path)
    options = DataOptions(batch_size=4, cache_mb=1)
    source = open_data(str(folder), options)
    decoded.clear()
    epochs(source, options, COLOUR)
    assert sorted(decoded.values())[:3] == [6] * 3
    assert len(decoded) == 24 - 2


def test_loading_processes_keep_nothing(folder, monkeypatch):
    monkeypatch.setattr(kept, "get_worker_info", object)
    images = open_data(str(folder)).splits["train"].images
    assert images[1][0] is not images[1][0]
    monkeypatch.undo()
    assert images[1][0] is images[1][0]


@pytest.mark.parametrize(("suffix", "given"), [("webp", {}), ("jpg", {"icc_profile": bytes(100_000)}), ("png", {})])
def test_only_pixels_are_kept_of_a_file(folder, suffix, given):
    # Pillow's decoder of WebP holds three times the image, and profiles of printers are larger than small images.
    for path in (folder / "train").rglob("*.png"):
        with Image.open(path) as image:
            image.save(path.with_suffix(f".{suffix}"), **given)
    source = open_data(str(folder), DataOptions())
    images = source.splits["train"].images
    for index, (path, _) in enumerate(images.samples):
        kept = images[index][0]
        assert images[index][0] is kept
        assert type(kept) is Image.Image
        assert not kept.info
        assert np.array_equal(np.asarray(kept), np.asarray(Image.open(path)))


def test_loading_processes_are_sent_no_images(folder):
    images = open_data(str(folder)).splits["train"].images
    for index in range(len(images)):
        images[index]
    empty = open_data(str(folder), DataOptions(cache_mb=0)).splits["train"].images
    assert len(pickle.dumps(images)) <= len(pickle.dumps(empty)) + 100
    sent = pickle.loads(pickle.dumps(images))
    assert np.array_equal(np.asarray(sent[0][0]), np.asarray(images[0][0]))
    assert sent[0][0] is not sent[0][0]


def test_nothing_is_kept_where_loading_processes_read(folder):
    images = open_data(str(folder), DataOptions(workers=1)).splits["train"].images
    assert images[0][0] is not images[0][0]


def test_a_kept_image_is_not_changed_by_what_is_done_to_one_of_its_copies(folder):
    source = open_data(str(folder))
    loader = make_loader(source, "val", COLOUR, DataOptions())
    first = next(iter(loader))[0]
    changed = loader.dataset.transform = transforms.Compose([Painted(), *loader.dataset.transform.transforms])
    assert not torch.equal(next(iter(loader))[0], first)
    changed.transforms.pop(0)
    assert torch.equal(next(iter(loader))[0], first)


class Painted:
    """A transform that changes its image in place."""

    def __call__(self, image: Image.Image) -> Image.Image:
        image.paste((9, 9, 9), (0, 0, 6, 6))
        return image
