"""The templates in docs/templates do what they say, so that what is copied from them works."""

import copy
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from places import ROOT
from torch import nn

import growfx
from growfx.passes.path_products.rules import table

TEMPLATES = ROOT / "docs" / "templates"
MOST_LINES = 60
Load = Callable[[str], ModuleType]


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Import a template by its name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"template_{name}", TEMPLATES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # annotations are looked up there
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("file", sorted(TEMPLATES.glob("*.py")), ids=lambda file: file.stem)
def test_a_template_is_short_and_named_in_the_guide(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MOST_LINES
    assert f"(docs/templates/{file.name})" in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_method_exchanges_edges_at_its_steps_and_keeps_their_number(template: Load) -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = template("method").RandomExchange(density=0.4, update_every=2, drop_fraction=0.5)
    method.attach(net, optimizer, total_steps=4, steps_per_epoch=2)
    asked, before = round(0.4 * net.numel), net.mask_digest()
    assert net.nnz == asked
    changed = []
    for _ in range(4):
        net(torch.randn(2, 8)).square().sum().backward()
        optimizer.step()
        changed.append(method.step())
        optimizer.zero_grad()
    assert changed == [False, True, False, True]
    assert net.nnz == asked
    assert net.mask_digest() != before


def test_the_method_refuses_options_out_of_range(template: Load) -> None:
    with pytest.raises(growfx.ConfigError, match="update_every"):
        template("method").RandomExchange(update_every=0)


class Neighbours(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.first, self.second, self.arguments = nn.Linear(3, 5), nn.Linear(3, 2), arguments

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.diff(self.first(x), n=2, **self.arguments)[:, :3])


@pytest.fixture
def _with_the_rule(template: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    for function, rule in template("path_rule").FUNCTIONS.items():
        monkeypatch.setitem(table.FUNCTIONS, function, rule)


@pytest.mark.usefixtures("_with_the_rule")
def test_the_path_rule_counts_every_path_through_the_operator() -> None:
    net = growfx.wrap(Neighbours().eval(), torch.randn(2, 3))
    paths = growfx.path_products(net)
    first, second = (net.layers[name].parameter.detach().double().abs() for name in ("first", "second"))
    # neighbours are summed twice: 1, 2 and 1 paths from three units in a row to one
    through = torch.tensor([[1.0, 2, 1, 0, 0], [0, 1, 2, 1, 0], [0, 0, 1, 2, 1]], dtype=torch.float64)
    assert paths.log_total == pytest.approx(math.log((second @ through @ first).sum()))
    expected = (second @ through).sum(0)[:, None].expand(5, 3)
    torch.testing.assert_close(paths.scores["first"] * math.exp(paths.log_scale), expected)


@pytest.mark.usefixtures("_with_the_rule")
def test_the_path_rule_refuses_what_it_does_not_follow() -> None:
    net = growfx.wrap(Neighbours(prepend=torch.zeros(1, 1)).eval(), torch.randn(1, 3))
    with pytest.raises(growfx.UnsupportedOperatorError, match="prepend"):
        growfx.path_products(net)


def test_the_pass_removes_what_does_nothing_and_leaves_the_network_alone(template: Load) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))
    without = copy.deepcopy(nn.Sequential(model[0], model[2], model[4]))
    net, x = growfx.wrap(model, torch.randn(2, 4)), torch.randn(3, 4)
    before = str(net.graph)
    result = template("graph_pass").drop_identities(net, x)
    assert result.removed == ("1", "3")
    assert [str(node.target) for node in result.model.graph.nodes if node.op == "call_module"] == ["0", "2", "4"]
    assert torch.equal(result.model(x), net.eval()(x))
    assert str(net.train().graph) == before
    assert template("graph_pass").drop_identities(growfx.wrap(without, torch.randn(2, 4)), x).removed == ()
