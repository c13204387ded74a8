"""Loaders whose images a network cannot compute: what they give, what it was recorded with, and no run is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import some
from error_facts import facts
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import growfx
from growfx.errors import DataError
from growfx.training.evaluation import evaluate

PLAIN: dict[str, Any] = {"epochs": 1, "device": "cpu", "progress": False, "kernels": "dense"}
IMAGES = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
OTHER = {
    "bytes": (IMAGES * 50 + 128).to(torch.uint8),
    "doubles": IMAGES.double(),
    "halves": IMAGES.half(),
    "grey": IMAGES[:, :1],
    "channels last": IMAGES.movedim(1, 3),
    "flat": IMAGES.flatten(1),
}


def net_of(norm: bool = True) -> growfx.MaskedGraph:
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(8)] if norm else []
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *norms, nn.Linear(8, 4)]
    return growfx.wrap(nn.Sequential(*layers), IMAGES[:2])


def loader(images: Tensor = IMAGES, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % 4), batch_size=batch_size, **options)


@pytest.mark.parametrize("part", ["training", "validation"])
@pytest.mark.parametrize("name", some(OTHER, lambda name: name in ("bytes", "grey")))
def test_images_of_another_kind_are_refused_with_both_kinds(name: str, part: str) -> None:
    images = OTHER[name]
    given = (loader(images), loader()) if part == "training" else (loader(), loader(images))
    shape = ", ".join(map(str, images.shape[1:]))
    with pytest.raises(DataError, match=facts(str(images.dtype), f"{shape})", "torch.float32", "(batch, 3, 6, 6)")):
        growfx.train(net_of(), *given, **PLAIN)


def test_a_loader_of_single_images_is_refused_before_a_run_is_replaced_where_norms_need_two(tmp_path: Path) -> None:
    growfx.train(net_of(), loader(), loader(), out=tmp_path / "run", **PLAIN)
    before = (tmp_path / "run" / "result.json").read_bytes()
    for alone in (loader(IMAGES[:9]), loader(batch_size=1)):
        net = net_of()
        weights = {name: value.clone() for name, value in net.state_dict().items()}
        with pytest.raises(DataError, match=facts("one", "`drop_last=True`", "`batch_size`")):
            growfx.train(net, alone, loader(), out=tmp_path / "run", overwrite=True, **PLAIN)
        assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_single_images_found_while_training_are_refused_too() -> None:
    batches = [(IMAGES[:4], torch.arange(4)), (IMAGES[:1], torch.arange(1))]
    with pytest.raises(DataError, match=facts("one", "`drop_last=True`", "`batch_size`")):
        growfx.train(net_of(), batches, loader(), **PLAIN)


def test_single_images_train_where_they_are_dropped_or_no_norm_needs_two() -> None:
    assert growfx.train(net_of(), loader(IMAGES[:9], drop_last=True), loader(), **PLAIN).steps == 2
    assert growfx.train(net_of(norm=False), loader(IMAGES[:9]), loader(IMAGES[:9]), **PLAIN).steps == 3


def test_looking_at_a_last_batch_of_one_leaves_no_trace_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for looks in (True, False):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.Linear(8 * 16, 4)]
        net = growfx.wrap(nn.Sequential(*layers), IMAGES[:2])
        with monkeypatch.context() as patched:
            if not looks:
                patched.setattr("growfx.training.run.check_last_batch", lambda *_: None)
            growfx.train(net, loader(IMAGES[:9]), loader(), **PLAIN)
        found.append(net.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_other_sizes_that_a_network_computes_are_trained_on_and_its_own_failures_are_left() -> None:
    larger = torch.randn(12, 3, 9, 9)
    assert growfx.train(net_of(), loader(larger), loader(), **PLAIN).steps == 3
    net = net_of()
    net.layers["0"].register_forward_pre_hook(_fails)
    for images in (IMAGES, larger):
        with pytest.raises(RuntimeError, match="of the model"), torch.no_grad():
            evaluate(net, loader(images), "cpu")


def _fails(module: nn.Module, inputs: Any) -> None:
    raise RuntimeError("a failure of the model")
