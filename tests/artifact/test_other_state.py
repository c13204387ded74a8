"""Entries of a state dict that are not parameters or buffers, and weights that it leaves out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import growfx
from growfx.errors import ArtifactError


class Scaled(nn.Module):
    """A layer times a number that is not a tensor of the module."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


class Extra(Scaled):
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.scale)

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = float(state)


class Own(Scaled):
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = torch.tensor(self.scale)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.scale = float(state_dict.pop(f"{prefix}scale"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@pytest.mark.parametrize("kind", [Extra, Own])
def test_state_that_is_not_a_tensor_of_a_module_comes_back(tmp_path: Path, kind: Callable[..., Scaled]):
    net = growfx.wrap(nn.Sequential(kind(3.0), nn.Linear(4, 2)), torch.randn(2, 4), density=0.5).eval()
    growfx.save(net, tmp_path / "out")
    model = growfx.load(tmp_path / "out", model=nn.Sequential(kind(), nn.Linear(4, 2)))
    x = torch.randn(3, 4)
    assert torch.equal(model(x), net(x))


def test_a_module_that_does_not_take_its_state_back_is_named_and_left_as_it_was(tmp_path: Path):
    class Refusing(Extra):
        def set_extra_state(self, state: Tensor) -> None:
            raise RuntimeError("not today")

    net = growfx.wrap(nn.Sequential(Refusing(3.0)), torch.randn(2, 4), density=0.5)
    growfx.save(net, tmp_path / "out")
    model = nn.Sequential(Refusing())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArtifactError, match="not today"):
        growfx.load(tmp_path / "out", model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_masked_weight_that_the_state_dict_leaves_out_is_named(tmp_path: Path):
    def without_backbone(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}0.")]:
            del state[name]

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model._register_state_dict_hook(without_backbone)
    net = growfx.wrap(model, torch.randn(2, 4), density=0.5)
    with pytest.raises(ArtifactError, match=r"weight of `0`.*exclude"):
        growfx.save(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masked_weights_that_came_to_share_memory_are_refused(tmp_path: Path):
    net = growfx.wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4), density=0.5)
    first, second = net.layers.values()
    second.parameter.data = first.parameter.data
    with pytest.raises(ArtifactError, match=r"`0.weight` and `1.weight`.*same memory"):
        growfx.save(net, tmp_path / "out")
