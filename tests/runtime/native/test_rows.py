"""Batches that are computed in parts, and networks that must not be: rows there depend on each other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_nets import Function, native, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from growfx.runtime.native.library import library_status

pytestmark = pytest.mark.skipif(bool(library_status()), reason=library_status() or "the library is there")

# So large that the buffers of a batch do not stay near the processor: a batch would be computed row by row.
SIDE, BATCH = 272, 17
WEIGHT = nn.Conv2d(1, 2, 3, padding=1)


def run(function: Callable[[Tensor], Any], batch: int, threads: int = 1) -> float:
    """The largest error of a network planned for one row, on a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(WEIGHT, Function(function)).eval()
    x = torch.randn(batch, 1, SIDE, SIDE)
    made = native(model, x[:1], threads=threads)(x)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(x))
    return max(relative_error(a, b) for a, b in zip(made, expected, strict=True))


def heads(x: Tensor) -> Tensor:
    """Attention whose queries, keys and values are cut out of one tensor with rows along its second axis."""
    parts = x.reshape(x.shape[0], SIDE, 3, 2, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(parts[0], parts[1], parts[2])


def classified(x: Tensor) -> Tensor:
    token = torch.ones(1, 1, SIDE).expand(x.shape[0], -1, -1)
    return torch.cat([token, x.flatten(1, 2)], 1).softmax(-1).mean(1)


BY_ROWS: dict[str, Callable[[Tensor], Any]] = {
    "pointwise": lambda x: torch.relu(x) + x * 0.5,
    "pool": lambda x: F.max_pool2d(x, 2),
    "heads": lambda x: heads(x[..., :240]),
    "a token": classified,
    "several outputs": lambda x: (x.sum((2, 3)), x.amax(1), x.flatten(1)[:, ::7]),
    "rows within rows": lambda x: x.reshape(-1, SIDE).softmax(1).reshape(x.shape),
    "a constant without rows": lambda x: x * torch.linspace(0, 1, SIDE),
    "turned twice": lambda x: x.permute(1, 0, 3, 2).relu().permute(1, 0, 2, 3),
}
ACROSS_ROWS: dict[str, Callable[[Tensor], Any]] = {
    "the other way round": lambda x: x.flip(0),
    "the first row": lambda x: x - x[:1],
    "all after all": lambda x: torch.cat([x, x + 1], 0),
    "beside each other": lambda x: torch.cat([x.flatten(1), x.flatten(1)], 1).reshape(2 * x.shape[0], -1),
    "another order in memory": lambda x: x.permute(1, 0, 2, 3).reshape(-1, SIDE).reshape(x.shape[0], -1).softmax(1),
    "rows as channels": lambda x: F.max_pool2d(x.permute(1, 0, 2, 3), (3, 3)).permute(1, 0, 2, 3),
    "products of rows": lambda x: x.flatten(1)[:, :64] @ x.flatten(1)[:, :64].t(),
    "every row with every other": lambda x: (x[:, 0, 0, :8, None] - x[:, 0, 0, :8].t()[None]).sum(1),
    "turned at the end": lambda x: x.flatten(1).t(),
}


@pytest.mark.parametrize("kind", BY_ROWS)
def test_rows_that_are_computed_one_after_the_other_are_those_of_the_batch(kind: str) -> None:
    for batch, threads in ((BATCH, 1), (BATCH, 3), (1, 2)):
        assert run(BY_ROWS[kind], batch, threads) < 1e-4


@pytest.mark.parametrize("kind", ACROSS_ROWS)
def test_rows_that_depend_on_each_other_are_computed_together(kind: str) -> None:
    assert run(ACROSS_ROWS[kind], BATCH) < 1e-4


def test_a_network_takes_batches_of_any_size_one_after_the_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(WEIGHT, nn.ReLU(), nn.Conv2d(2, 1, 5, stride=2)).eval()
    network = native(model, torch.zeros(1, 1, SIDE, SIDE), threads=2)
    for batch in (5, 1, 8, 3, 17):
        x = torch.randn(batch, 1, SIDE, SIDE)
        with torch.no_grad():
            assert relative_error(network(x)[0], model(x)) < 1e-4
