"""Forward hooks of modules that are one node of a graph."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from breadth import some
from torch import Tensor, nn
from torch.nn import functional as F

import growfx


def half(value: Tensor) -> Tensor:
    """Blocks the last two of four units."""
    return F.pad(value[:, :2], (0, 2))


class Half(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return half(value)


def in_place(value: Tensor) -> None:
    value[:, 2:] = 0


def plain(*before: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), *before, nn.Linear(4, 2))


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "output": lambda m: m.register_forward_hook(lambda module, inputs, output: half(output)),
    "output, in place": lambda m: m.register_forward_hook(lambda module, inputs, output: in_place(output)),
    "input": lambda m: m.register_forward_pre_hook(lambda module, inputs: (half(inputs[0]),)),
    "input with keywords": lambda m: m.register_forward_pre_hook(
        lambda module, inputs, named: ((half(inputs[0]),), named), with_kwargs=True
    ),
    "forward": lambda m: m.__dict__.update(forward=lambda value: half(F.relu(value))),
}


@pytest.mark.parametrize("kind", some(HOOKS, lambda kind: kind in list(HOOKS)[::2]))
@pytest.mark.parametrize("training", [False, True])
def test_path_products_see_what_a_hook_of_an_activation_does(kind: str, training: bool) -> None:
    model = plain(nn.ReLU()).train(training)
    HOOKS[kind](model[2])
    net = growfx.wrap(model, torch.randn(3, 4))
    scores = growfx.path_products(net).scores
    expected = growfx.path_products(growfx.wrap(plain(nn.ReLU(), Half()), torch.randn(3, 4))).scores
    assert net.trace_report.faithful
    torch.testing.assert_close(scores["0"], expected["0"])
    torch.testing.assert_close(scores["3"], expected["4"])
    x = torch.randn(5, 4)
    torch.testing.assert_close(net(x), model(x))


@pytest.mark.parametrize("name", ["0", "1", "3"])
def test_path_products_see_what_a_hook_of_a_layer_or_norm_does(name: str) -> None:
    model = plain()
    model = nn.Sequential(collections.OrderedDict([("0", model[0]), ("1", model[1]), ("3", model[2])]))
    getattr(model, name).register_forward_pre_hook(lambda module, inputs: (half(inputs[0]),))
    scores = growfx.path_products(growfx.wrap(model, torch.randn(3, 4))).scores
    cut = scores["0"][:, 2:] if name == "0" else scores["0"][2:]  # inputs, or units, that the hook blocks
    assert not cut.any()
    assert scores["0"].any()


def test_hooks_that_look_on_leave_a_layer_one_node() -> None:
    seen: list[Any] = []
    model = plain(nn.ReLU(inplace=True))
    for module in model:
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        module.register_full_backward_hook(lambda module, before, after: None)
    net = growfx.wrap(model, torch.randn(3, 4))
    graph = net.graph_module(training=False).graph
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    assert not seen  # of the caller's model nothing was called


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_graphs_follow_hooks_of_all_modules_that_come_and_go(register: str) -> None:
    def blocked(module: nn.Module, inputs: Any, output: Any = None) -> Any:
        if isinstance(module, nn.ReLU):
            value = half(inputs[0] if output is None else output)
            return (value,) if output is None else value
        return None

    net = growfx.wrap(plain(nn.ReLU()), torch.randn(3, 4))
    expected = growfx.path_products(growfx.wrap(plain(nn.ReLU(), Half()), torch.randn(3, 4))).log_total
    open_paths = growfx.path_products(net).log_total
    handle = getattr(nn.modules.module, register)(blocked)
    try:
        assert growfx.path_products(net).log_total == pytest.approx(expected)
    finally:
        handle.remove()
    assert growfx.path_products(net).log_total == open_paths != pytest.approx(expected)
