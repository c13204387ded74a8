"""What is done to a model inside the block is undone by an exception, and by nothing else."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from growfx.artifact.rollback import unchanged_on_error


def meddle(model: nn.Sequential) -> None:
    layer = model[0]
    layer.weight.data = torch.zeros(1, 1)
    layer.weight.grad = None
    layer.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    layer.bias, layer.out_features = None, 1
    model[1].register_buffer("of_an_empty_registry", torch.zeros(2))
    model[1].inplace = True
    model.add_module("more", nn.Linear(2, 2))
    model.half()
    model.eval()


def test_an_exception_undoes_all_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4))
    model(torch.randn(5, 3)).square().sum().backward()
    printed, parameters = str(model), dict(model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: value.grad for name, value in parameters.items()}
    copies = {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}
    with suppress(KeyboardInterrupt), unchanged_on_error(model):
        meddle(model)
        raise KeyboardInterrupt
    assert str(model) == printed
    assert model.training
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert all(value.grad is gradients[name] for name, value in model.named_parameters())
    assert all(torch.equal(value, copies[name]) for name, value in gradients.items() if value is not None)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_an_exception_changes_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4))
    with unchanged_on_error(model):
        meddle(model)
    assert model[0].out_features == 1
    assert "more.weight" in model.state_dict()
    assert not model.training
