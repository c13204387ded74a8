"""Passes that return a network: what it reads like before and after, and what all of their results have in common."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lower_nets import Residual, recorded
from torch import Tensor, fx, nn

import growfx
from growfx.passes.compact import compact
from growfx.passes.fold_norm import fold_norm
from growfx.passes.lower import lower
from growfx.passes.lower.network import lower_network
from growfx.passes.trials import PassResult
from growfx.runtime.lowered_layer import LoweredLayer

GOLDEN = Path(__file__).parent / "golden"
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual(4).eval()


def half_dead() -> growfx.MaskedGraph:
    """The network with a stem of which half the units have no edge and pass nothing on."""
    net = growfx.wrap(model(), X)
    mask = torch.ones_like(net.layers["stem"].mask)
    mask[::2] = False
    net.set_masks({"stem": mask})
    for parameter in (net.shell.stem.bias, net.shell.norm.weight, net.shell.norm.bias):
        parameter.data[::2] = 0.0
    return net


def module_text(network: nn.Module) -> str:
    """Names and classes of the innermost modules, and the shapes of their weights."""
    parts = {name: module for name, module in network.named_modules() if not list(module.children())}
    shapes = {name: part.get_parameter("weight").shape for name, part in parts.items() if "weight" in part._parameters}
    return "\n".join(f"{name}: {type(part).__name__} {[*shapes.get(name, ())]}" for name, part in parts.items())


def graph_text(module: fx.GraphModule) -> str:
    return "\n".join(str(node.format_node()) for node in module.graph.nodes if node.op not in ("placeholder", "output"))


def masked() -> tuple[str, str]:
    net = growfx.wrap(model(), X, exclude=["head"])
    return module_text(model()), f"{module_text(net.shell)}\n{net.trace_report}"


def folded() -> tuple[str, str]:
    result = fold_norm(growfx.wrap(model(), X))
    return module_text(model()), f"{module_text(result.net)}\n{result.report}"


def compacted() -> tuple[str, str]:
    result = compact(half_dead())
    return module_text(model()), f"{module_text(result.net)}\n{result.report}"


def lowered() -> tuple[str, str]:
    module, _ = recorded(growfx.wrap(model(), X), X)
    before = graph_text(module)
    after = graph_text(lower(module, dict.fromkeys(("stem", "first", "shortcut", "second", "head"), "dense")))
    assert graph_text(module) == before
    assert not [part for part in module.modules() if isinstance(part, LoweredLayer)]
    return before, after


@pytest.mark.parametrize(
    ("name", "texts"), [("mask", masked), ("fold_norm", folded), ("compact", compacted), ("lower", lowered)]
)
def test_a_network_reads_as_the_golden_text_before_and_after_a_pass(
    name: str, texts: Callable[[], tuple[str, str]]
) -> None:
    before, after = (re.sub(r"largest error \S+", "largest error ...", text) for text in texts())
    assert f"{before}\n\n--- {name} ---\n\n{after}\n" == (GOLDEN / f"pass_{name}.txt").read_text()


def runtime(net: growfx.MaskedGraph) -> PassResult[Any]:
    masks = {name: layer.mask for name, layer in net.layers.items()}
    return lower_network(growfx.unwrap(net).eval(), masks, torch.float32, X)


@pytest.mark.parametrize("run", [fold_norm, compact, runtime])
def test_the_result_of_a_pass_computes_what_the_network_does_and_leaves_it_alone(
    run: Callable[[growfx.MaskedGraph], PassResult[Any]],
) -> None:
    net = half_dead().eval()
    state, expected = copy.deepcopy(net.state_dict()), net(X)
    result = run(net)
    torch.testing.assert_close(result.net(X), expected, rtol=1e-4, atol=1e-5)
    assert result.model is result.net
    assert not result.net.training
    assert str(result) == str(result.report) != ""
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


class Plain(nn.Module):
    """Nothing to fold, and no unit that the output can do without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)) + 1)


@pytest.mark.parametrize("run", [fold_norm, compact])
def test_a_result_says_whether_anything_was_changed(run: Callable[[growfx.MaskedGraph], PassResult[Any]]) -> None:
    assert run(half_dead()).modified
    torch.manual_seed(0)
    assert not run(growfx.wrap(Plain(), torch.randn(2, 4))).modified
