"""Compaction leaves out what only training runs, and says what it had to keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import growfx
from growfx.compaction.apply import apply_plan
from growfx.compaction.plan import CompactionPlan
from growfx.errors import ArtifactError
from growfx.passes.compact.network import Compacted, compact


class Auxiliary(nn.Module):
    """A network with a head for training, and other things that evaluation does not run, or seems not to."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.aux: nn.Module | None = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        if kind == "tied":
            self.aux = nn.Sequential(nn.Linear(8, 4))
            self.aux[0].weight = self.head.weight
        self.spare = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).mean((2, 3))
        if self.kind == "asked":
            assert self.aux is not None
            x = x + len(list(self.aux.children()))
        if self.kind == "data" and self.aux is not None and float(x.sum()) > 1e6:
            return self.aux(x)
        if self.kind == "one of a list":
            x = self.spare[1](x)
        if self.kind == "used without a call":
            x = x + self.aux[0].bias.sum() + self.spare[0].weight.sum()
        if self.training and self.aux is not None:
            return self.head(x) + self.aux(x)
        return self.head(x)


def compacted(kind: str) -> tuple[growfx.MaskedGraph, Tensor, Compacted]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    net = growfx.wrap(Auxiliary(kind), x).eval()
    net.layers["stem"].mask[3] = False
    net.settle()
    result = compact(net)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), net(x))
    return net, x, result


@pytest.mark.parametrize(
    ("kind", "gone", "stays"),
    [
        ("plain", {"aux", "spare"}, {}),
        ("tied", {"spare"}, {"aux": "head.weight"}),
        ("asked", {"spare"}, {"aux": "fails"}),
        ("one of a list", {"aux", "spare.0", "spare.2"}, {}),
        ("used without a call", {"aux.2", "spare.1", "spare.2"}, {}),
    ],
)
def test_modules_that_evaluation_never_runs_leave(kind: str, gone: set[str], stays: dict[str, str]) -> None:
    net, _, result = compacted(kind)
    assert set(result.report.left_out) == gone
    assert result.report.unread.keys() == stays.keys()
    for name, fact in stays.items():
        assert fact in result.report.unread[name]
    text = str(result.report)
    assert all(f"`{name}`" in text for name in (*gone, *stays))
    kept = {name for name, _ in net.shell.named_parameters() if not any(name.startswith(f"{g}.") for g in gone)}
    assert {name for name, _ in result.model.named_parameters()} == kept
    assert not any(name.startswith(tuple(f"{g}." for g in gone)) for name in result.masks)
    assert result.report.parameters[1] == sum(p.numel() for p in result.model.parameters())


def test_what_data_may_choose_stays_and_the_report_says_so() -> None:
    _, _, result = compacted("data")
    assert "aux" not in result.report.left_out
    assert result.report.refusal or "aux" in result.report.unread


@pytest.mark.parametrize("kind", ["plain", "one of a list"])
def test_the_artifact_loads_without_them(kind: str, tmp_path: Path) -> None:
    net, x, result = compacted(kind)
    growfx.save(net, tmp_path / "out", compact=True)
    loaded = growfx.load(tmp_path / "out", model=Auxiliary(kind))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in result.model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), net(x))
    assert growfx.inspect(tmp_path / "out").numel < net.numel


def test_a_plan_that_leaves_out_more_than_a_module_once_is_refused() -> None:
    for plan in (
        CompactionPlan(left_out=("nothing",)),
        CompactionPlan(left_out=("",)),
        CompactionPlan(left_out=("aux", "aux.0")),
        CompactionPlan(left_out=("aux",), modules={"aux.0": {"out_features": 8}}),
    ):
        model = Auxiliary()
        before = dict(model.named_modules())
        with pytest.raises(ArtifactError):
            apply_plan(model, plan)
        assert dict(model.named_modules()) == before
    plan = CompactionPlan(left_out=("aux",))
    assert CompactionPlan.from_json(plan.to_json()) == plan
    assert apply_plan(Auxiliary(), plan).aux is None
