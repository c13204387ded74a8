"""Fifty steps with sparse kernels, against the same training in double precision."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.runtime.train.library import training_status

pytestmark = pytest.mark.skipif(bool(training_status()), reason=training_status() or "the kernels are there")


def trained(kernels: str, dtype: torch.dtype, make: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    images, classes = torch.randn(16, 3, 10, 10), torch.arange(16) % 4
    net = growfx.wrap(model, images[:1], density=0.2).to(dtype)
    growfx.use_kernels(net, kernels)
    optimizer = make(net.parameters())
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(net(images.to(dtype)), classes).backward()
        optimizer.step()
    if kernels == "sparse":
        assert {choice.kernel for choice in net.kernel_report.layers.values()} == {"sparse"}
    return {name: value.double() for name, value in net.state_dict().items() if value.is_floating_point()}


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    ],
    ids=["sgd", "adamw"],
)
def test_sparse_kernels_are_no_further_from_double_precision_than_dense_ones(make: Any) -> None:
    exact = trained("dense", torch.float64, make)
    sparse, dense = trained("sparse", torch.float32, make), trained("dense", torch.float32, make)

    def distance(values: dict[str, Tensor]) -> float:
        return max(float((values[name] - exact[name]).abs().max()) for name in exact)

    assert distance(sparse) <= 3 * distance(dense) + 1e-5
    assert distance(sparse) < 0.01
