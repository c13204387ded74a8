"""Options of the recipe: each has the effect that its name says, and a run continues bit for bit with it."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from breadth import some
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Sampler
from training_nets import QUICK, final_state, fresh_net, interrupt_at, loaders

import growfx
from growfx.errors import ConfigError, GrowfxWarning
from growfx.methods.session import Stage
from growfx.options import TrainOptions
from growfx.runs.checkpoint import content_digest
from growfx.training.recipe import make_loss, make_mixup, schedule_of, seed_globally
from growfx.training.start import train


def rates(options: TrainOptions, stage: Stage, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    schedule = schedule_of(optimizer, options, stage, steps)
    found = []
    for step in range(stage.epochs * steps):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


EXPECTED = {
    "cosine": lambda done: 0.02 + (2 - 0.02) * (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 0.02 + (2 - 0.02) * (1 - done),
    "step": lambda done: 2 * 0.1 ** (12 * done // 4),
    "constant": lambda done: 2,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_schedule_warms_up_and_follows_its_name(name):
    options = TrainOptions(lr=2.0, schedule=name, min_lr=0.01, warmup_epochs=1)
    found = rates(options, Stage("final", 12))
    assert found[:4] == pytest.approx([0.2, 0.65, 1.1, 1.55])
    assert found[4:] == pytest.approx([EXPECTED[name](step / 48) for step in range(4, 48)])


def test_the_steps_of_a_schedule_can_be_set():
    options = TrainOptions(lr=1.0, schedule="step", decay_epochs=2.5, decay_rate=0.5, warmup_epochs=0)
    assert rates(options, Stage("final", 6)) == pytest.approx([0.5 ** (step // 10) for step in range(24)])


def test_the_schedule_is_that_of_the_final_training_alone():
    plain, other = TrainOptions(), TrainOptions(schedule="constant")
    for kind in ("round", "level", "search"):
        assert rates(plain, Stage(kind, 3)) == rates(other, Stage(kind, 3))


@pytest.mark.parametrize("name", ["linear", "step", "constant"])
def test_the_base_of_tickets_has_the_schedule_of_the_run(name):
    options = TrainOptions(schedule=name)
    assert rates(options, Stage("base", 6)) == rates(options, Stage("final", 6))
    assert rates(options, Stage("base", 6)) != rates(TrainOptions(), Stage("base", 6))


def test_steps_of_another_schedule_are_refused():
    with pytest.raises(ConfigError, match=r"`decay_epochs` = 3\.0 is of `schedule` = `step`, which here is `cosine`"):
        TrainOptions(decay_epochs=3)
    with pytest.raises(ConfigError, match="`schedule` = 'plateau' is unknown; allowed: `cosine`, `linear`"):
        TrainOptions(schedule="plateau")


SCORES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 3, 1, 2, 2, 0])
SOFT = torch.softmax(SCORES.flip(0), 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_smooths_class_numbers_and_takes_mixed_targets_as_they_are(smoothing):
    loss = make_loss(TrainOptions(label_smoothing=smoothing))
    torch.testing.assert_close(loss(SCORES, CLASSES), F.cross_entropy(SCORES, CLASSES, label_smoothing=smoothing))
    torch.testing.assert_close(loss(SCORES, SOFT), F.cross_entropy(SCORES, SOFT))


def test_the_binary_loss_asks_for_every_class_by_itself():
    loss = make_loss(TrainOptions(loss="bce", label_smoothing=0.2))
    smooth = 0.8 * F.one_hot(CLASSES, 4) + 0.2 / 4
    torch.testing.assert_close(loss(SCORES, CLASSES), F.binary_cross_entropy_with_logits(SCORES, smooth))
    torch.testing.assert_close(loss(SCORES, SOFT), F.binary_cross_entropy_with_logits(SCORES, SOFT))


def mixed_with(options: TrainOptions, images: torch.Tensor, targets: torch.Tensor):
    np.random.seed(0)  # noqa: NPY002 - timm draws from it
    mix = make_mixup(options, 4)
    assert mix is not None
    return mix(images, targets)


def test_mixup_blends_a_batch_with_itself_reversed_and_its_targets_alike():
    images, targets = torch.randn(6, 1, 8, 8), CLASSES
    before = images.clone()
    mixed, soft = mixed_with(TrainOptions(mixup=1.0), images, targets)
    assert torch.equal(images, before)
    part = float(soft[0, 0] if CLASSES[0] != CLASSES[-1] else soft[1, 3])
    assert 0.01 < part < 0.99
    torch.testing.assert_close(mixed, part * images + (1 - part) * images.flip(0))
    hot = F.one_hot(targets, 4).float()
    torch.testing.assert_close(soft, part * hot + (1 - part) * hot.flip(0))


def test_cutmix_pastes_a_rectangle_and_weighs_the_targets_by_its_area():
    images, targets = torch.randn(6, 1, 8, 8), CLASSES
    mixed, soft = mixed_with(TrainOptions(cutmix=1.0), images, targets)
    own = mixed == images
    assert torch.equal(torch.where(own, images, images.flip(0)), mixed)
    assert 0 < float(own.float().mean()) < 1
    hot = F.one_hot(targets, 4).float()
    part = float(own.float().mean())
    torch.testing.assert_close(soft, part * hot + (1 - part) * hot.flip(0))


def test_targets_are_smoothed_before_they_are_mixed():
    _, soft = mixed_with(TrainOptions(mixup=1.0, label_smoothing=0.4), torch.randn(2, 1, 8, 8), torch.tensor([1, 1]))
    torch.testing.assert_close(soft, torch.tensor([[0.1, 0.7, 0.1, 0.1]] * 2))


def test_images_of_bytes_are_blended_and_rounded():
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    for options in (TrainOptions(mixup=1.0), TrainOptions(cutmix=1.0)):
        targets = torch.tensor([0, 1, 2, 3])
        mixed, soft = mixed_with(options, images, targets)
        expected, same = mixed_with(options, images.float(), targets)
        assert mixed.dtype == torch.uint8
        assert torch.equal(mixed.float(), expected.round())
        assert torch.equal(soft, same)


def test_cutmix_alone_moves_images_of_any_type_as_they_are():
    targets = torch.tensor([0, 1, 2, 3])
    for images in (torch.rand(4, 1, 9, 9) < 0.5, 2**40 + torch.arange(4 * 81).view(4, 1, 9, 9)):
        mixed, _ = mixed_with(TrainOptions(cutmix=1.0), images, targets)
        assert mixed.dtype == images.dtype
        assert not torch.equal(mixed, images)
        assert ((mixed == images) | (mixed == images.flip(0))).all()


@pytest.mark.parametrize("given", [torch.ones(2, 1, 4, 4, dtype=torch.bool), torch.ones(2, 7, dtype=torch.long)])
def test_what_is_not_an_amount_is_not_blended(given: torch.Tensor):
    with pytest.raises(ConfigError, match=r"blends numbers, and a batch is torch\.(bool|int64) of shape"):
        mixed_with(TrainOptions(mixup=1.0), given, torch.tensor([0, 1]))


def test_without_mixup_and_cutmix_nothing_is_mixed():
    assert make_mixup(TrainOptions(), 4) is None


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ConfigError, match="one has 5; choose an even batch size"):
        mixed_with(TrainOptions(mixup=1.0), torch.randn(5, 1, 8, 8), CLASSES[:5])
    with pytest.raises(ConfigError, match=r"`cutmix` cuts rectangles .* has shape \(6, 3\); `mixup` alone"):
        mixed_with(TrainOptions(cutmix=1.0), torch.randn(6, 3), CLASSES)
    train_loader, val_loader = loaders()
    odd = DataLoader(train_loader.dataset, batch_size=15)
    with pytest.raises(ConfigError, match="one has 15"):
        train(fresh_net(), odd, val_loader, options=QUICK, mixup=0.2, progress=False)


CHANGES = {
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "both": {"mixup": 0.2, "cutmix": 0.5, "label_smoothing": 0.1},
    "binary": {"loss": "bce"},
    "step": {"schedule": "step"},
    "linear": {"schedule": "linear"},
    "constant": {"schedule": "constant"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    train_loader, val_loader = loaders()
    path = tmp_path_factory.mktemp("plain") / "run"
    train(fresh_net(), train_loader, val_loader, options=QUICK, out=path, progress=False)
    return content_digest(final_state(path)["net"])


@pytest.mark.parametrize("name", some(CHANGES, lambda name: name == "both"))
def test_an_option_changes_the_outcome_and_a_run_with_it_continues_bit_for_bit(tmp_path, monkeypatch, plain, name):
    def run(path, **flags):
        train_loader, val_loader = loaders()
        net = fresh_net()
        return train(net, train_loader, val_loader, options=QUICK, out=path, progress=False, **CHANGES[name], **flags)

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 3)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    assert run(tmp_path / "parts", resume=True) == whole
    found = content_digest(final_state(tmp_path / "whole"))
    assert content_digest(final_state(tmp_path / "parts")) == found
    assert content_digest(final_state(tmp_path / "whole")["net"]) != plain


def test_mixing_leaves_batches_that_the_caller_keeps_alone():
    train_loader, val_loader = loaders()
    kept = list(train_loader)
    before = [images.clone() for images, _ in kept]
    train(fresh_net(), kept, val_loader, options=QUICK, epochs=1, mixup=1.0, cutmix=1.0, progress=False)
    assert all(torch.equal(images, own) for (images, _), own in zip(kept, before, strict=True))


class OrderOfEpoch(Sampler[int]):
    """Draws its order from the number of the epoch alone, as samplers do that repeat augmented images."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter([(self.epoch + i) % 4 for i in range(4)])

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize("inside", [False, True])
def test_a_sampler_that_draws_by_the_epoch_is_told_it(inside):
    sampler = OrderOfEpoch()
    order = {"batch_sampler": BatchSampler(sampler, 2, False)} if inside else {"sampler": sampler}
    loader = DataLoader(range(4), **order)
    seed_globally(0, -1, loader)
    assert list(sampler) == [0, 1, 2, 3]
    seed_globally(0, 2, loader)
    assert list(sampler) == [2, 3, 0, 1]


@pytest.mark.parametrize(
    ("optimizer", "storage", "density", "warns"),
    [
        ("cadamw", "dense", 0.3, True),
        ("cadamw", "dense", None, False),
        ("cadamw", "present", 0.3, False),
        ("adamw", "dense", 0.3, False),
    ],
)
def test_optimizers_whose_step_grows_where_edges_are_absent_are_warned_of(optimizer, storage, density, warns, tmp_path):
    options = replace(QUICK, epochs=1, warmup_epochs=0, lr=1e-3, optimizer=optimizer, storage=storage, kernels="auto")
    method = None if density is None else growfx.methods.create("static", density=density)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(fresh_net(), *loaders(), method=method, out=tmp_path / "run", options=options)
    told = [str(warning.message) for warning in caught if issubclass(warning.category, GrowfxWarning)]
    assert any("absent edges never move" in text for text in told) == warns
