"""Linear layers that leave their outputs as the kernels lay them out: the same results under any forward."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import growfx
from growfx.runtime.train.library import training_status
from growfx.runtime.train.rows import InnerRows, rows_are_inner

pytestmark = pytest.mark.skipif(bool(training_status()), reason=training_status() or "the kernels are there")

ROWS = 24  # a multiple of nothing that the kernels count in


class Double(torch.autograd.Function):
    """Twice its input, by a function that no tracer looks into."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.reshape(-1).view(x.shape) * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * 2


class Rectify(torch.autograd.Function):
    """A rectification that counts on the layout of what it keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return grad * (x.view(-1) > 0).view(x.shape)


class DoubleInPlace(torch.autograd.Function):
    """Twice its input, written into it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * 2


class Mlp(nn.Module):
    """Two layers in a row, a third beside the first, put together as `middle` says."""

    def __init__(self, middle: Callable[["Mlp", Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(10, 40), nn.Linear(10, 40), nn.Linear(40, 6)
        self.act, self.drop, self.nothing = nn.GELU(), nn.Dropout(0.0), nn.Identity()
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self, x))


def plain(m: Mlp, x: Tensor) -> Tensor:
    return m.drop(m.nothing(m.act(m.first(x))))


def directly(m: Mlp, x: Tensor) -> Tensor:
    return m.first(x)


def gated(m: Mlp, x: Tensor) -> Tensor:
    return F.silu(m.gate(x)) * m.first(x) * 0.5


def in_place(m: Mlp, x: Tensor) -> Tensor:
    return F.relu(m.first(x).mul_(2).add_(0.1), inplace=True)


def squared(m: Mlp, x: Tensor) -> Tensor:
    return m.first(x).relu().square()


LEFT = [plain, directly, gated, in_place, squared]


def joined(m: Mlp, x: Tensor) -> Tensor:
    return torch.cat([m.act(m.first(x))[..., :20], m.gate(x)[..., 20:]], -1)


def normed(m: Mlp, x: Tensor) -> Tensor:
    return F.layer_norm(m.act(m.first(x)), (40,))


def read_twice(m: Mlp, x: Tensor) -> Tensor:
    hidden = m.first(x)
    return m.act(hidden) * hidden.mean(-1, keepdim=True)


def through_a_function(m: Mlp, x: Tensor) -> Tensor:
    return Double.apply(m.first(x))


def dropped(m: Mlp, x: Tensor) -> Tensor:
    return F.dropout(m.act(m.first(x)), 0.5, m.training)


TURNED = [joined, normed, read_twice, through_a_function, dropped]


def pair(middle: Callable[[Mlp, Tensor], Tensor]) -> tuple[growfx.MaskedGraph, growfx.MaskedGraph]:
    torch.manual_seed(0)
    net = growfx.wrap(Mlp(middle), torch.randn(2, 3, 10), density=0.3)
    return net, growfx.use_kernels(copy.deepcopy(net), "sparse")


def results(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    inputs = x.clone().requires_grad_()
    net.zero_grad()
    torch.manual_seed(1)
    out = net(inputs)
    out.square().sum().backward()
    assert inputs.grad is not None
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "inputs": inputs.grad, **grads}


def assert_same(net: nn.Module, sparse: nn.Module, x: Tensor) -> None:
    expected, found = results(net, x), results(sparse, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5 * float(value.abs().max() + 1))


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what was left as it lay and had to be turned after all."""
    seen: list[torch.Size] = []
    before = InnerRows._turn

    def counted(self: InnerRows, value: Tensor) -> None:
        seen.append(value.shape)
        before(self, value)

    monkeypatch.setattr(InnerRows, "_turn", counted)
    return seen


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what was left as it lay."""
    seen: list[torch.Size] = []
    before = InnerRows.add

    def counted(self: InnerRows, value: Tensor) -> None:
        assert rows_are_inner(value)
        seen.append(value.shape)
        before(self, value)

    monkeypatch.setattr(InnerRows, "add", counted)
    return seen


@pytest.mark.parametrize("shape", [(ROWS, 10), (8, 3, 10), (2, 4, 3, 10)], ids=lambda shape: f"{len(shape)}d")
@pytest.mark.parametrize("middle", LEFT)
def test_what_lies_between_layers_is_not_turned(
    middle: Callable[[Mlp, Tensor], Tensor], shape: tuple[int, ...], left: list[torch.Size], turned: list[torch.Size]
) -> None:
    net, sparse = pair(middle)
    for training in (True, False):
        assert_same(net.train(training), sparse.train(training), torch.randn(shape))
    assert left
    assert not turned


@pytest.mark.parametrize("middle", TURNED)
def test_what_another_function_reads_lies_as_torch_lays_it_out(
    middle: Callable[[Mlp, Tensor], Tensor], left: list[torch.Size]
) -> None:
    net, sparse = pair(middle)
    for training in (True, False):
        assert_same(net.train(training), sparse.train(training), torch.randn(8, 3, 10))
    assert not left


# -- forwards that do something else than was recorded ----------------------------------------------------------------


def viewed(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    return m.act(hidden.view(-1)).view(hidden.shape)


def written_to(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    hidden[..., 3] = 0
    hidden[..., 5].mul_(2)
    return m.act(hidden)


def written_to_without_gradient(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        hidden[..., 3].zero_()
    return m.act(hidden)


def read_without_gradient(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        scale = hidden.softmax(-1)
    return m.act(hidden) * scale


def by_a_function(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    return Double.apply(m.act(hidden))


def by_a_function_that_keeps_it(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    return Rectify.apply(hidden)


def by_a_function_in_place(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    return DoubleInPlace.apply(hidden)


def moved_without_gradient(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        hidden.mul_(2)
    return hidden.cos()


def read_in_inference_mode(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = float(hidden.softmax(-1).max())
    return m.act(hidden) * scale


def with_a_hook_on_what_was_read(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    read = m.act(hidden)
    hidden.register_hook(lambda grad: grad * 3)
    return read


def with_a_gradient_of_what_was_read(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    read = m.act(hidden)
    (slope,) = torch.autograd.grad(m.last(read).sum(), hidden, create_graph=True)
    return read + slope


def read_by_its_strides(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    return torch.as_strided(hidden, hidden.shape, hidden.stride()).cos()


def asked_how_it_lies(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    return m.act(hidden if hidden.is_contiguous() else -hidden)


def mixed_with_another_layout(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    other = torch.arange(40.0).expand(len(x), 1, 40).contiguous()
    return (other * hidden).view(-1).view(hidden.shape)


def added_to_a_view(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    whole = torch.zeros(40, *x.shape[:-1])
    view = whole.movedim(0, -1)
    view.add_(hidden)
    view.clamp_(max=0.1)
    return m.act(hidden) + whole.sum()


def checkpointed_by_a_function(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    again = checkpoint(lambda given: m.act(m.first(given)), x, use_reentrant=True)
    assert isinstance(again, Tensor)
    return again.cos() + m.act(hidden)


def checkpointed(m: Mlp, x: Tensor, hidden: Tensor) -> Tensor:
    again = checkpoint(lambda given: m.act(m.first(given)), x, use_reentrant=False)
    assert isinstance(again, Tensor)
    return again + m.act(hidden)


@pytest.mark.parametrize(
    "otherwise",
    [
        viewed,
        written_to,
        written_to_without_gradient,
        read_without_gradient,
        by_a_function,
        by_a_function_that_keeps_it,
        by_a_function_in_place,
        moved_without_gradient,
        read_in_inference_mode,
        with_a_hook_on_what_was_read,
        with_a_gradient_of_what_was_read,
        read_by_its_strides,
        asked_how_it_lies,
        mixed_with_another_layout,
        added_to_a_view,
        checkpointed,
        checkpointed_by_a_function,
    ],
)
def test_a_forward_that_does_something_else_than_was_recorded_gives_what_it_gives(
    otherwise: Callable[[Mlp, Tensor, Tensor], Tensor], left: list[torch.Size]
) -> None:
    changed: list[bool] = []

    def middle(m: Mlp, x: Tensor) -> Tensor:
        hidden = m.first(x)
        return otherwise(m, x, hidden) if changed else m.act(hidden)

    net, sparse = pair(middle)
    changed.append(True)
    x = torch.randn(8, 3, 10)
    assert_same(net, sparse, x)
    assert left


def test_outputs_are_laid_out_as_torch_lays_them_out() -> None:
    changed: list[bool] = []

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 40), nn.Linear(40, 6)

        def forward(self, x: Tensor) -> list[Tensor]:
            hidden = self.first(x).relu()
            return [self.last(hidden), hidden, hidden] if changed else [self.last(hidden)]

    torch.manual_seed(0)
    net = growfx.wrap(Hidden(), torch.randn(2, 3, 10), density=0.3)
    sparse = growfx.use_kernels(copy.deepcopy(net), "sparse")
    x = torch.randn(8, 3, 10)
    for changes in (False, True):
        changed.extend([True] * changes)
        expected, found = net(x), sparse(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert all(value.is_contiguous() for value in found)


def test_a_norm_that_waits_gets_its_values_where_it_meets_what_a_layer_left(left: list[torch.Size]) -> None:
    changed: list[bool] = []

    class Meets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(6, 6, 3, padding=1, bias=False), nn.BatchNorm1d(6)
            self.first, self.last = nn.Linear(10, 10), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            normed, hidden = self.norm(self.conv(x)), self.first(x)
            if changed:
                return self.last((hidden + normed).relu())
            return F.relu(normed + x) + self.last(hidden.relu())

    torch.manual_seed(0)
    net = growfx.wrap(Meets(), torch.randn(2, 6, 10), density=0.4)
    sparse = growfx.use_kernels(copy.deepcopy(net), "sparse")
    changed.append(True)
    assert_same(net, sparse, torch.randn(8, 6, 10))
    assert left


@dataclasses.dataclass
class Features:
    """What a model returns that torch's trees know nothing of."""

    out: Tensor
    hidden: Tensor


@dataclasses.dataclass(slots=True)
class SlottedFeatures:
    """The same without a dict."""

    out: Tensor
    hidden: Tensor


@pytest.mark.parametrize("kind", [Features, SlottedFeatures])
def test_features_that_are_returned_in_evaluation_alone_are_torchs_and_have_gradients(
    kind: Callable[[Tensor, Tensor], Any], left: list[torch.Size]
) -> None:
    class Explains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 40), nn.Linear(40, 6)

        def forward(self, x: Tensor) -> Any:
            hidden = self.first(x)
            out = self.last(F.gelu(hidden))
            return out if self.training else kind(out, hidden)

    torch.manual_seed(0)
    net = growfx.wrap(Explains(), torch.randn(2, 3, 10), density=0.3)
    sparse, x = growfx.use_kernels(copy.deepcopy(net), "sparse"), torch.randn(8, 3, 10)
    found = []
    for one in (net.eval(), sparse.eval()):
        made = one(x)
        assert made.hidden.is_contiguous()
        found.append(torch.autograd.grad(made.out.square().sum(), made.hidden)[0])
    assert left
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_other_tensors_keep_their_layout_and_memory_where_linear_layers_alone_are_left(left: list[torch.Size]) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 40), nn.Linear(40, 6)

        def forward(self, x: Tensor) -> Tensor:
            out = self.last(F.gelu(self.first(x)))
            turned = torch.zeros(6, *x.shape[:-1]).permute(2, 0, 1)  # images would lie so
            turned.reshape(turned.shape).add_(1)
            return out.permute(1, 2, 0).contiguous().permute(2, 0, 1) + turned.sum()

    torch.manual_seed(0)
    net = growfx.wrap(Writes(), torch.randn(2, 3, 10), density=0.3)
    sparse, x = growfx.use_kernels(copy.deepcopy(net), "sparse"), torch.randn(8, 3, 10)
    expected, found = net(x), sparse(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.stride() == expected.stride()
    assert left


def test_a_model_that_keeps_what_lies_between_layers_finds_it_as_torch_lays_it_out(left: list[torch.Size]) -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 40), nn.Linear(40, 6)
            self.kept = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.first(x)
            return self.last(self.kept.relu())

    torch.manual_seed(0)
    net = growfx.use_kernels(growfx.wrap(Keeps(), torch.randn(2, 3, 10), density=0.3), "sparse")
    net(torch.randn(8, 3, 10))
    assert net.shell.kept.is_contiguous()
    assert not left


def test_half_precision_keeps_torchs_layout(left: list[torch.Size]) -> None:
    net, sparse = pair(plain)
    x = torch.randn(8, 3, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sparse(x), net(x), rtol=0.05, atol=0.05)
    assert not left


def test_gradients_of_gradients_pass_through() -> None:
    found = []
    for one in pair(plain):
        x = torch.ones(8, 3, 10).normal_(generator=torch.Generator().manual_seed(1)).requires_grad_()
        (gradient,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max() + 1))


def test_present_edges_and_every_number_of_threads_give_the_same_bits() -> None:
    _, sparse = pair(gated)
    x, found = torch.randn(40, 7, 10), []
    for threads, storage in ((1, "dense"), (2, "dense"), (3, "present")):
        torch.set_num_threads(threads)
        one = growfx.use_kernels(copy.deepcopy(sparse), "sparse", storage=storage)
        found.append({k: v for k, v in results(one, x).items() if k in ("out", "inputs") or k.endswith("bias")})
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=0)


def test_a_layer_whose_output_is_read_elsewhere_in_one_of_its_calls_is_not_left(left: list[torch.Size]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu()) + self.first(x).sum(-1, keepdim=True)

    torch.manual_seed(0)
    net = growfx.wrap(Twice(), torch.randn(2, 3, 10), density=0.3)
    assert_same(net, growfx.use_kernels(copy.deepcopy(net), "sparse"), torch.randn(8, 3, 10))
    assert not left
