"""Training options that have no effect: told exactly where two values of them train the same network."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import growfx
from growfx.options import TrainOptions
from growfx.training.unused import TABLE, Training, unused_in

GROWTH = {"name": "random-growth", "seed_density": 0.3, "growth_ratio": 2.0, "max_density": 0.5, "epochs_per_round": 1}
TICKETS = {"name": "imp", "density": 0.5, "levels": 1, "rewind_epochs": 0.0}

# Method (None: the masks there are), what the run is given, an option with a value that is not the default, and whether
# it is told of.
ROWS: list[tuple[dict[str, Any] | None, dict[str, Any], str, Any, bool]] = [
    (None, {"schedule": "constant"}, "min_lr", 0.5, True),
    (None, {"schedule": "step"}, "min_lr", 0.5, True),
    (None, {}, "min_lr", 0.5, False),
    (None, {"schedule": "linear"}, "min_lr", 0.5, False),
    (GROWTH, {"schedule": "constant"}, "min_lr", 0.5, False),
    (TICKETS, {"schedule": "constant"}, "min_lr", 0.5, False),
    (None, {}, "decay_rate", 0.9, True),
    (None, {"schedule": "step"}, "decay_rate", 0.9, False),
    (None, {}, "round_lr", 0.5, True),
    (None, {}, "round_warmup", 0.5, True),
    (None, {}, "ema_decay", 0.5, True),
    (TICKETS, {}, "round_lr", 0.5, True),
    (GROWTH, {}, "round_lr", 0.5, False),
    (GROWTH, {}, "round_warmup", 0.5, False),
    (None, {"optimizer": "adam"}, "momentum", 0.1, True),
    (None, {}, "momentum", 0.1, False),
    (None, {}, "channels_last", True, True),
    (None, {}, "keep_checkpoints", 3, True),
    (None, {}, "checkpoint_minutes", 1.0, True),
    (None, {}, "overwrite", True, True),
    (None, {}, "about", {"by": "me"}, True),
]


def trained(method: dict[str, Any] | None, **options: Any) -> tuple[growfx.MaskedGraph, list[str]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 6, generator=generator)
    loader = DataLoader(TensorDataset(images, images[:, :3].argmax(1)), batch_size=6)
    torch.manual_seed(0)
    net = growfx.wrap(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), images[:2])
    given = {"epochs": 3, "warmup_epochs": 0.0, "device": "cpu", "kernels": "dense", "progress": False} | options
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        growfx.train(net, loader, loader, method=None if method is None else growfx.methods.create(**method), **given)
    return net, [str(warning.message) for warning in seen]


@pytest.mark.parametrize(("method", "options", "option", "value", "told"), ROWS)
def test_an_option_is_told_of_where_it_changes_nothing(method, options, option, value, told):
    plain, before = trained(method, **options)
    changed, seen = trained(method, **{**options, option: value})
    same = all(map(torch.equal, plain.state_dict().values(), changed.state_dict().values()))
    assert (same, [message.partition(" = ")[0] for message in seen]) == (told, [f"`{option}`"] * told)
    assert not before
    assert all("has no effect" in message for message in seen)


def test_options_of_a_run_folder_and_of_images_are_not_told_of_where_there_are_some(tmp_path):
    options = TrainOptions(keep_checkpoints=3, checkpoint_minutes=None, channels_last=True)
    assert not unused_in(Training(options, ("final",)))
    assert set(unused_in(Training(options, ("final",), saved=False, layouts=False))) == {
        "keep_checkpoints",
        "checkpoint_minutes",
        "channels_last",
    }


def test_deterministic_choices_of_kernels_are_told_of_on_an_accelerator_alone():
    options = TrainOptions(deterministic=True)
    assert not unused_in(Training(options, ("final",), device="cpu"))
    assert "`cuda`" in unused_in(Training(options, ("final",), device="cuda"))["deterministic"]


def test_a_method_of_others_whose_stages_are_not_known_is_not_told_of_rounds():
    assert not unused_in(Training(TrainOptions(round_lr=0.5, min_lr=0.1, schedule="constant"), None))


def test_the_table_names_options_that_there_are():
    named = {option for row in TABLE for option in row.options}
    assert named <= {*TrainOptions.__dataclass_fields__, "overwrite", "about"}
