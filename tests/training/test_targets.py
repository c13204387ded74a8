"""What loaders may be, and what they may give as targets: class numbers of the network's outputs, or mixed targets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from error_facts import facts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import growfx
from growfx.errors import ConfigError, DataError
from growfx.training.evaluation import evaluate

NUMBERS = torch.arange(20) % 10
ONE_HOT = F.one_hot(NUMBERS, 10).float()
PLAIN: dict[str, Any] = {"epochs": 1, "device": "cpu", "progress": False, "kernels": "dense"}


def loader(targets: Tensor) -> DataLoader[Any]:
    images = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, targets), batch_size=10)  # as many as there are classes


def trained(targets: Tensor, outputs: int = 10, val: Tensor | None = None, **options: Any) -> growfx.MaskedGraph:
    torch.manual_seed(0)
    net = growfx.wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs)), torch.randn(2, 8))
    growfx.train(net, loader(targets), loader(targets if val is None else val), **PLAIN | options)
    return net


def weights(net: growfx.MaskedGraph) -> list[Tensor]:
    return [parameter.detach() for parameter in net.parameters()]


@pytest.mark.parametrize("options", [{}, {"loss": "bce"}, {"label_smoothing": 0.1}, {"mixup": 0.2}], ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16])
def test_class_numbers_of_any_whole_type_train_alike(kind, options):
    found, expected = trained(NUMBERS.to(kind), **options), trained(NUMBERS, **options)
    assert all(map(torch.equal, weights(found), weights(expected)))


@pytest.mark.parametrize("options", [{}, {"loss": "bce"}], ids=str)
def test_targets_for_each_class_train_as_the_class_numbers_they_stand_for(options):
    found, expected = trained(ONE_HOT, val=NUMBERS, **options), trained(NUMBERS, **options)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(found), weights(expected), strict=True))


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (NUMBERS.float(), (torch.float32, "(10,)")),
        (NUMBERS[:, None], (torch.int64, "(10, 1)")),
        (ONE_HOT.long(), (torch.int64, "(10, 10)")),
        (torch.randn(20, 2, 2), (torch.float32, "(10, 2, 2)")),
    ],
    ids=["numbers of another type", "a column", "whole one-hot", "more dimensions"],
)
def test_other_targets_are_refused_by_type_and_shape(targets, told):
    for arguments in ({"targets": targets}, {"targets": NUMBERS, "val": targets}):
        with pytest.raises(DataError, match=facts(*map(str, told), "class numbers")):
            trained(**arguments)


def test_accuracy_is_not_measured_against_mixed_targets():
    with pytest.raises(DataError, match=facts("(10, 10)", "mixed")):
        trained(NUMBERS, val=ONE_HOT)


def test_targets_of_other_classes_than_the_network_scores_are_refused():
    with pytest.raises(DataError, match=facts("(10, 4)", "(10, 10)")):
        trained(torch.rand(20, 4), val=NUMBERS)


def test_what_a_loader_has_mixed_is_not_mixed_again():
    with pytest.raises(DataError, match=facts("`mixup`", "(10, 10)")):
        trained(ONE_HOT, val=NUMBERS, mixup=0.2)


@pytest.mark.parametrize("options", [{}, {"loss": "bce"}, {"label_smoothing": 0.1}, {"mixup": 0.2}], ids=str)
@pytest.mark.parametrize(("targets", "least", "most"), [(NUMBERS + 1, 1, 10), (NUMBERS - 1, -1, 8)])
def test_classes_that_the_network_has_no_output_for_are_named(targets, least, most, options):
    with pytest.raises(DataError, match=facts(least, most, 10)):
        trained(targets, val=NUMBERS, **options)


@pytest.mark.parametrize("number", [-1, -100, 10])
def test_images_of_no_class_count_neither_as_right_nor_as_wrong_but_are_refused(number):
    targets = torch.where(NUMBERS == 3, number, NUMBERS)
    with pytest.raises(DataError, match=facts(number, 10)):
        evaluate(nn.Linear(8, 10), loader(targets), "cpu")


@pytest.mark.parametrize("options", [{}, {"loss": "bce"}], ids=str)
def test_a_network_of_one_output_is_refused_for_its_loss_would_be_zero(options):
    with pytest.raises(ConfigError, match=facts(1, "output", "own loop")):
        trained(torch.zeros(20, dtype=torch.long), outputs=1, **options)


@pytest.mark.parametrize("once", [iter, lambda batches: (b for b in batches), lambda batches: map(tuple, batches)])
@pytest.mark.parametrize("part", ["train", "val"])
def test_what_can_be_iterated_over_once_is_refused_for_its_first_batch_would_be_lost(part, once):
    loaders: dict[str, Any] = {name: loader(NUMBERS) for name in ("train", "val", "test")}
    loaders[part] = once(loaders[part])
    net = growfx.wrap(nn.Linear(8, 10), torch.randn(2, 8))
    with pytest.raises(DataError, match="once"):
        growfx.train(net, loaders["train"], loaders["val"], test_loader=loaders["test"], **PLAIN)


def test_one_pass_is_refused_for_validation_that_is_the_test_too():
    once = iter(loader(NUMBERS))
    with pytest.raises(DataError, match="validation loader can be iterated over once"):
        growfx.train(growfx.wrap(nn.Linear(8, 10), torch.randn(2, 8)), loader(NUMBERS), once, test_loader=once, **PLAIN)


class Restarting:
    """An iterator that begins again, as those of NVIDIA's DALI do."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Restarting:
        self.left = iter(self.batches)
        return self

    def __next__(self) -> Any:
        return next(self.left)


def test_iterators_that_begin_again_and_a_test_loader_of_one_pass_are_taken():
    results = []
    for kind in (list, Restarting):
        torch.manual_seed(0)
        net = growfx.wrap(nn.Linear(8, 10), torch.randn(2, 8))
        train, val = (kind(loader(NUMBERS)) for _ in range(2))
        results.append(growfx.train(net, train, val, test_loader=iter(loader(NUMBERS)), **PLAIN))
    assert results[0].val_accuracy == results[1].val_accuracy
    assert results[0].test_accuracy == results[1].test_accuracy is not None


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=str)
def test_images_without_a_class_are_left_out_of_the_loss_and_told_of(options):
    some_left_out = torch.where(torch.arange(20) % 4 == 1, -100, NUMBERS)
    with pytest.warns(growfx.GrowfxWarning, match=facts("-100", "leaves out")) as seen:
        trained(some_left_out, val=NUMBERS, epochs=2, **options)
    assert len(seen) == 1


@pytest.mark.parametrize("options", [{}, {"loss": "bce"}], ids=str)
def test_smoothing_of_targets_that_the_loader_has_mixed_is_told_to_have_no_effect(options):
    plain = trained(ONE_HOT, val=NUMBERS, **options)
    with pytest.warns(growfx.GrowfxWarning, match=facts("`label_smoothing` = 0.2", "(batch, classes)")) as seen:
        smooth = trained(ONE_HOT, val=NUMBERS, label_smoothing=0.2, **options)
    assert len(seen) == 1
    assert all(map(torch.equal, weights(plain), weights(smooth)))


class Longer:
    """A loader that gives four batches, whatever it says."""

    def __init__(self, said: int) -> None:
        self.said, self.batches = said, list(loader(NUMBERS)) * 2

    def __len__(self) -> int:
        return self.said

    def __iter__(self) -> Any:
        return iter(self.batches)


class GoingOn(Longer):
    """One that goes on in the next epoch where it was in the last."""

    def __iter__(self) -> GoingOn:
        return self

    def __next__(self) -> Any:
        self.batches.append(self.batches.pop(0))
        return self.batches[-1]


class Holding(Longer):
    """One that holds such an iterator."""

    def __init__(self, said: int) -> None:
        super().__init__(said)
        self.stream = itertools.cycle(self.batches)

    def __iter__(self) -> Any:
        return self.stream


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_beyond_the_length_of_a_loader_are_told_of_once(accumulate):
    net = growfx.wrap(nn.Linear(8, 10), torch.randn(2, 8))
    with pytest.warns(growfx.GrowfxWarning, match=facts("2 batches", "more", "__len__")) as seen:
        growfx.train(net, Longer(2), loader(NUMBERS), **PLAIN | {"epochs": 2}, accumulate=accumulate)
    assert len(seen) == 1


@pytest.mark.parametrize("train", [Longer(4), GoingOn(3), Holding(3)], ids=lambda one: type(one).__name__)
def test_loaders_of_which_no_batch_is_left_out_are_not_told_of(train):
    net = growfx.wrap(nn.Linear(8, 10), torch.randn(2, 8))
    growfx.train(net, train, loader(NUMBERS), **PLAIN)


def test_a_network_that_is_frozen_whole_says_so():
    net = growfx.wrap(nn.Linear(8, 10).requires_grad_(False), torch.randn(2, 8))
    with pytest.raises(ConfigError, match="`requires_grad`"):
        growfx.train(net, loader(NUMBERS), loader(NUMBERS), **PLAIN)


def test_a_batch_without_any_class_is_named_as_the_reason_of_a_loss_that_is_no_number():
    second_left_out = torch.where(torch.arange(20) < 10, NUMBERS, -100)
    with pytest.warns(growfx.GrowfxWarning, match="-100"), pytest.raises(DataError, match=facts("epoch 1", "-100")):
        trained(second_left_out, val=NUMBERS)
