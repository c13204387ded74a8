"""Models whose own forward reads values out of its data: what holds for other values too is recorded and checked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from breadth import some
from torch import Tensor, fx, nn

import growfx


class Padded(nn.Module):
    """Skips masking where nothing is padded, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.a(x).relu()
        if not mask.all():
            y = y * mask[..., None]
        return self.b(y)


class Counted(Padded):
    """Makes a mask of as many places as the longest row has; `mask` holds the lengths of the rows."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        lengths = mask
        longest = {
            "item": lambda: int(lengths.max().item()),
            "int": lambda: int(lengths.max()),
            "index": lambda: lengths.max().__index__(),
            "tolist": lambda: lengths.amax(0, keepdim=True).tolist()[0],
            "float": lambda: round(float(lengths.max())),
        }[self.read]()
        inside = torch.arange(longest) < lengths[:, None]
        return self.b(self.a(x[:, :longest]).relu() * inside[..., None])


def _lengths(*values: int) -> Tensor:
    return torch.tensor(values)


def _run(net: growfx.MaskedGraph, graph: fx.Graph, *inputs: Any) -> Tensor:
    return fx.GraphModule(net.shell, graph)(*inputs)


def test_a_branch_that_other_values_take_too_is_recorded_and_named() -> None:
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    net = growfx.wrap(Padded(), (x, mask), density=0.5)
    assert not net.trace_report.opaque
    assert net.trace_report.faithful
    (branch,) = net.trace_report.branches
    assert "`bool`" in branch
    assert "True" in branch
    assert "test_values_read" in branch
    assert branch in str(net.trace_report)
    assert growfx.path_products(net).log_total > -torch.inf


def test_its_graph_takes_other_rows_and_refuses_other_values() -> None:
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    net = growfx.wrap(Padded(), (x, mask), density=0.5).eval()
    module = net.graph_module()
    more = torch.randn(7, 5, 4), torch.ones(7, 5, dtype=torch.bool)
    torch.testing.assert_close(module(*more), net(*more))
    mask[0, 2] = False
    with pytest.raises(growfx.TraceError, match=r"True.*False"):
        module(x, mask)
    # The net is the model itself, and a pass records the other branch.
    torch.testing.assert_close(net(x, mask), growfx.unwrap(net)(x, mask))
    torch.testing.assert_close(_run(net, net.graph_at(x, mask), x, mask), net(x, mask))
    torch.testing.assert_close(_run(net, net.graph_at(*more), *more), net(*more))


def test_a_copy_checks_values_as_the_net_does() -> None:
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    net = copy.deepcopy(growfx.wrap(Padded(), (x, mask)).eval())
    mask[1, 1] = False
    torch.testing.assert_close(_run(net, net.graph_at(x, mask), x, mask), net(x, mask))


@pytest.mark.parametrize(
    "read", some(["item", "int", "index", "tolist", "float"], lambda read: read in ("item", "index"))
)
def test_a_number_read_from_the_input_is_a_constant_that_the_graph_checks(read: str) -> None:
    x, lengths = torch.randn(3, 6, 4), _lengths(5, 3, 5)
    net = growfx.wrap(Counted(read), (x, lengths), density=0.5).eval()
    assert not net.trace_report.opaque
    assert net.trace_report.faithful
    assert net.trace_report.branches
    graph = net.graph_at(x, lengths)
    torch.testing.assert_close(_run(net, graph, x, lengths), net(x, lengths))
    with pytest.raises(growfx.TraceError, match="5"):
        _run(net, graph, x, _lengths(2, 3, 4))
    torch.testing.assert_close(
        _run(net, net.graph_at(x, _lengths(2, 3, 4)), x, _lengths(2, 3, 4)), net(x, _lengths(2, 3, 4))
    )


def test_a_value_that_changes_with_the_input_leaves_the_model_whole() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) / x.abs().max().item()

    net = growfx.wrap(Scaled(), torch.randn(2, 4))
    assert "`item`" in net.trace_report.opaque[""]
    assert not net.trace_report.branches
    assert not net.trace_report.faithful
    assert growfx.path_products(net).log_total > -torch.inf


def test_a_branch_on_how_many_rows_are_found_is_checked_by_its_outcome() -> None:
    class Found(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = x[x[:, 0] > -50]
            return self.fc(rows) if rows.shape[0] > 1 else x.new_zeros(0, 2)

    net = growfx.wrap(Found(), torch.randn(4, 4)).eval()
    assert not net.trace_report.opaque
    (branch,) = net.trace_report.branches
    assert "branch on a size" in branch
    some = torch.tensor([-60.0, 0.0, 0.0, 0.0])[:, None].repeat(1, 4)
    module = net.graph_module()
    torch.testing.assert_close(module(some), net(some))
    with pytest.raises(growfx.TraceError, match=r"True.*False"):
        module(some - 60)


def test_a_random_number_is_never_taken_as_a_constant() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if torch.rand(()) < 2 else x

    net = growfx.wrap(Skips(), torch.randn(2, 4))
    assert "random number" in net.trace_report.opaque[""]
    assert not net.trace_report.branches


def test_what_a_submodule_reads_stays_inside_it() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = Padded(), nn.Linear(2, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.last(self.inner(x, mask))
            return y if bool(mask.any()) else y * 0

    net = growfx.wrap(Around(), (torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)))
    assert list(net.trace_report.opaque) == ["inner"]
    assert len(net.trace_report.branches) == 1
    assert net.trace_report.faithful


def test_the_sparse_runtime_takes_inputs_with_other_values(tmp_path: Any) -> None:
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    net = growfx.wrap(Padded(), (x, mask), density=0.2).eval()
    growfx.save(net, tmp_path / "out")
    loaded = growfx.load(tmp_path / "out", model=Padded(), runtime="sparse", example_inputs=(x, mask))
    mask[0, :3] = False
    torch.testing.assert_close(loaded(x, mask), net(x, mask))
