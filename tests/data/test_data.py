import gzip
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from error_facts import facts
from PIL import Image
from torch import nn

from growfx.data.loaders import InputFormat, fit_input, fit_size, make_loader
from growfx.data.sources import Split, open_data
from growfx.errors import ConfigError, DataError
from growfx.models.build import create_model
from growfx.options import DataOptions


def write_images(folder: Path, count: int, size: int = 12, shade: int = 0) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (size, size + i % 2), (shade, 10 * i % 256, 90)).save(folder / f"{i}.png")


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 20), ("test", 4)):
        for shade, name in enumerate(("cat", "dog", "owl")):
            write_images(tmp_path / split / name, count, shade=80 * shade)
    return tmp_path


@pytest.fixture(scope="module")
def digits():
    return open_data("digits")


def test_the_splits_of_digits_are_disjoint_whole_and_stratified(digits):
    indices = [i for split in digits.splits.values() for i in split.indices]
    assert sorted(indices) == list(range(1797))
    targets = digits.splits["train"].images.targets
    everywhere = Counter(targets.tolist())
    for split in digits.splits.values():
        for digit, count in Counter(targets[list(split.indices)].tolist()).items():
            assert count / len(split) == pytest.approx(everywhere[digit] / 1797, abs=0.01)


def test_the_splits_are_the_same_in_every_run_and_others_for_another_seed(digits):
    again, other = open_data("digits"), open_data("digits", DataOptions(split_seed=1))
    assert again.fingerprint == digits.fingerprint
    assert other.fingerprint != digits.fingerprint


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_fit_the_channels_of_the_model_and_are_scaled(digits, channels):
    model = create_model("test_resnet", num_classes=10, in_chans=channels)
    form = fit_input(digits, model, DataOptions())
    assert form.input_size == (channels, 32, 32)
    loader = make_loader(digits, "train", form, DataOptions(batch_size=500))
    images, targets = next(iter(loader))
    assert images.shape == (500, channels, 32, 32)
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    # Enlarging smooths, so that the deviation is below that of the pixels themselves.
    assert float(images.mean()) == pytest.approx(0, abs=0.1)
    assert 0.7 < float(images.std()) < 1.1


def test_a_digit_is_the_image_scikit_learn_has(digits):
    from sklearn.datasets import load_digits

    form = InputFormat((1, 8, 8), (0.0,), (1.0,))
    images, targets = next(iter(make_loader(digits, "test", form, DataOptions(batch_size=5))))
    index = list(digits.splits["test"].indices[:5])
    bunch = load_digits()
    assert targets.tolist() == bunch.target[index].tolist()
    assert np.allclose(images[:, 0], bunch.images[index] / 16, atol=0.5 / 255)


def test_a_training_order_follows_the_global_seed(digits):
    form = InputFormat((1, 8, 8), (0.0,), (1.0,))
    loader = make_loader(digits, "train", form, DataOptions(), train=True)
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        orders.append(torch.cat([targets for _, targets in loader]).tolist())
    assert orders[0] == orders[1] != orders[2]


def test_a_folder_without_val_holds_out_part_of_train(folder):
    source = open_data(str(folder), DataOptions(val_fraction=0.1))
    assert source.classes == ("cat", "dog", "owl")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 54, "val": 6, "test": 12}
    held = [source.splits["val"].images[i][1] for i in source.splits["val"].indices]
    assert Counter(held) == {0: 2, 1: 2, 2: 2}
    assert not set(source.splits["val"].indices) & set(source.splits["train"].indices)


def test_a_folder_with_val_and_test_is_taken_as_it_is(folder):
    for name in ("cat", "dog"):
        write_images(folder / "val" / name, 3)
    source = open_data(str(folder))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 60, "val": 6, "test": 12}
    # A class that evaluation lacks keeps its number.
    write_images(folder / "val" / "owl", 1)
    assert [t for _, t in open_data(str(folder)).splits["val"].images.samples] == [0, 0, 0, 1, 1, 1, 2]


def test_batches_of_a_folder_are_augmented_in_training_only(folder):
    source = open_data(str(folder))
    form = InputFormat((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    options = DataOptions(batch_size=8)
    val = make_loader(source, "test", form, options)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(val, val, strict=True))
    assert len(make_loader(source, "train", form, options, train=True)) == 54 // 8
    assert len(val) == 2


def test_workers_give_the_images_that_the_process_itself_gives(folder):
    source = open_data(str(folder))
    form = InputFormat((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    own = [x for x, _ in make_loader(source, "test", form, DataOptions(batch_size=8))]
    theirs = [x for x, _ in make_loader(source, "test", form, DataOptions(batch_size=8, workers=1))]
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))


def test_a_batch_is_never_larger_than_the_split(folder):
    source = open_data(str(folder))
    form = InputFormat((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    images, _ = next(iter(make_loader(source, "train", form, DataOptions(batch_size=1000), train=True)))
    assert len(images) == 54


@pytest.mark.parametrize(
    ("native", "model", "size"), [(8, 224, 32), (32, 224, 32), (33, 224, 64), (500, 224, 224), (28, 16, 16)]
)
def test_the_size_is_that_of_the_images_up_to_the_models(native, model, size):
    assert fit_size(native, model) == size


def test_a_model_of_one_size_gets_that_size_and_refuses_another(digits):
    model = create_model("test_vit", num_classes=10, img_size=32)
    assert fit_input(digits, model, DataOptions()).input_size == (3, 32, 32)
    with pytest.raises(ConfigError, match=facts("`img_size`", 64, "32x32")):
        fit_input(digits, model, DataOptions(img_size=64))


def test_a_model_of_other_channels_is_refused(digits):
    model = create_model("test_resnet", in_chans=4)
    with pytest.raises(DataError, match=facts("channels", 4, 1)):
        fit_input(digits, model, DataOptions())


def test_a_model_without_a_config_takes_colour_at_224(folder):
    assert fit_input(open_data(str(folder)), nn.Linear(1, 1), DataOptions()).input_size == (3, 32, 32)


def test_an_input_format_survives_json():
    form = InputFormat((1, 8, 8), (0.1,), (0.2,), "bicubic", 0.9)
    assert InputFormat.from_json(form.as_json()) == form
    with pytest.raises(DataError, match="not readable"):
        InputFormat.from_json({"size": 3})


def test_missing_data_names_what_is_allowed(tmp_path):
    with pytest.raises(DataError, match=facts(str(tmp_path / "nothing"), "`digits`", "folder")):
        open_data(str(tmp_path / "nothing"))


def test_a_folder_without_train_says_what_it_holds(tmp_path):
    with pytest.raises(DataError, match=facts(str(tmp_path), "`train/`")):
        open_data(str(tmp_path))
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=facts("`photos`", "`train/`", "`val/`", "`test/`")):
        open_data(str(tmp_path))


def test_a_train_folder_without_class_folders_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=facts(0, "class folders")):
        open_data(str(tmp_path))


def test_a_class_folder_without_images_is_named(folder):
    (folder / "train" / "yak").mkdir()
    with pytest.raises(DataError, match=facts("images", "`yak`")):
        open_data(str(folder))


def test_a_class_only_the_test_split_has_is_named(folder):
    write_images(folder / "test" / "yak", 2)
    with pytest.raises(DataError, match=facts(1, "`yak`", "`train/`", 3)):
        open_data(str(folder))


def test_unreadable_images_are_counted_and_named(folder):
    (folder / "train" / "cat" / "3.png").write_bytes(b"no image")
    (folder / "train" / "dog" / "5.png").write_bytes(b"")
    with pytest.raises(DataError, match=facts(2, 60, "3.png", "5.png")):
        open_data(str(folder))


def test_an_image_cut_short_is_named_when_it_is_read(folder):
    path = folder / "test" / "cat" / "0.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    source = open_data(str(folder))
    form = InputFormat((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(DataError, match=facts(str(path))):
        list(make_loader(source, "test", form, DataOptions()))


def test_a_class_of_one_image_cannot_be_held_out(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split / "a", 5)
        write_images(tmp_path / split / "b", 1)
    with pytest.raises(DataError, match=facts("class", 1)):
        open_data(str(tmp_path))


def test_a_split_that_is_not_there_is_named(folder):
    write_images(folder / "val" / "cat", 1)
    source = open_data(str(folder))
    with pytest.raises(DataError, match=facts("`extra`", "`train`", "`val`", "`test`")):
        source.split("extra")


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.tobytes())
    gzip.open(f"{path}.gz", "wb").close()


def test_a_timm_spec_reads_the_files_torchvision_keeps(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 10)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    source = open_data("torch/mnist", DataOptions(data_dir=str(tmp_path), val_fraction=0.25))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 30, "val": 10, "test": 10}
    assert len(source.classes) == 10
    form = InputFormat((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    images, targets = next(iter(make_loader(source, "val", form, DataOptions())))
    assert images.shape == (10, 3, 32, 32)
    assert sorted(targets.tolist()) == list(range(10))


def test_a_timm_spec_without_its_files_says_how_to_get_them(tmp_path):
    with pytest.raises(DataError, match=facts("`torch/cifar10`", str(tmp_path), "`download=true`")):
        open_data("torch/cifar10", DataOptions(data_dir=str(tmp_path)))


def test_an_unknown_timm_spec_names_the_known_ones():
    with pytest.raises(DataError, match=facts("`torch/cifar12`", "`torch/cifar10`", "did you mean `torch/cifar10`")):
        open_data("torch/cifar12")


@pytest.mark.parametrize(
    ("given", "meant"), [("digitz", "digits"), ("torch/minst", "torch/mnist"), ("Torch/CIFAR-10", "torch/cifar10")]
)
def test_the_nearest_data_set_is_named(given, meant):
    with pytest.raises(DataError, match=facts(f"`{given}`", f"did you mean `{meant}`")):
        open_data(given)


def test_a_split_knows_its_length():
    assert len(Split(None, (1, 2, 3))) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_an_augmented_epoch_follows_its_seed_whatever_was_loaded_before(folder, workers):
    from growfx.training.recipe import seed_globally

    source = open_data(str(folder))
    form = InputFormat((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    options = DataOptions(batch_size=16, workers=workers, auto_augment="rand-m9-mstd0.5", random_erase=0.3)
    sums, images = [], torch.empty(0)
    for epochs in ([0, 1, 2], [2], [3]):
        loader = make_loader(source, "train", form, options, train=True)
        for epoch in epochs:
            seed_globally(5, epoch)
            images = torch.cat([x for x, _ in loader])
        sums.append(images)
    assert torch.equal(sums[0], sums[1])
    assert not torch.equal(sums[1], sums[2])
