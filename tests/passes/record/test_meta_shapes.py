"""Short cuts to shapes against what torch computes on values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from growfx.passes.record.meta_shapes import function_shapes, module_shapes, short_shapes


def meta(nest: Any) -> Any:
    return tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, nest)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 5)])
def test_shapes_of_recurrences_are_those_torch_computes(
    kind: type[nn.RNNBase], batch_first: bool, shape: tuple[int, ...]
) -> None:
    module = kind(5, 7, num_layers=2, bidirectional=True, batch_first=batch_first)
    got = module_shapes(module, (torch.empty(shape, device="meta"),))
    expected = module(torch.randn(shape))
    assert [t.shape for t in tree_leaves(expected)] == [t.shape for t in tree_leaves(got)]


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (F.linear, (torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5))),
        (F.layer_norm, (torch.randn(2, 3, 4), (3, 4))),
        (F.scaled_dot_product_attention, (torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 6))),
        (F.grid_sample, (torch.randn(2, 3, 8, 8), torch.rand(2, 5, 6, 2), "bilinear", "zeros", False)),
    ],
)
def test_shapes_of_functions_are_those_torch_computes(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    got = function_shapes(function, meta(args))
    assert got is not None
    expected = function(*args)
    assert (got.shape, got.dtype, got.is_meta) == (expected.shape, expected.dtype, True)


def test_what_does_not_fit_is_left_to_torch_to_refuse() -> None:
    value, weight = torch.empty(2, 3, device="meta"), torch.empty(5, 4, device="meta")
    assert function_shapes(F.linear, (value, weight)) is None
    with pytest.raises(RuntimeError), short_shapes():
        F.linear(value, weight)


def test_values_are_never_replaced() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(2, 4)
    expected = model(x)
    with short_shapes():
        assert torch.equal(model(x), expected)
