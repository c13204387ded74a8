"""Activations kept with the batch innermost: the same results under any forward a model may have."""

import copy
from collections.abc import Callable

import pytest
import torch
from breadth import some
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import growfx
from growfx.runtime.train import flow
from growfx.runtime.train.library import training_status

pytestmark = pytest.mark.skipif(bool(training_status()), reason=training_status() or "the kernels are there")


class Block(nn.Module):
    """Two convolutions with norms and a way around them, put together as `join` says."""

    def __init__(self, join: Callable[["Block", Tensor], Tensor], stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        # Without biases: before a norm their gradients are nothing but rounding.
        self.a, self.b = nn.Conv2d(8, 12, 3, stride, 1, bias=False), nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.way = nn.Conv2d(8, 12, 1, stride, bias=False)
        self.norm_a, self.norm_b, self.norm_way = nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.BatchNorm2d(12)
        self.relu, self.nothing = nn.ReLU(inplace=True), nn.Identity()
        self.fc = nn.Linear(12, 4)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.join(self, self.stem(x)).mean((2, 3)))


def residual(m: Block, x: Tensor) -> Tensor:
    y = m.relu(m.norm_a(m.a(x)))
    y = m.norm_b(m.b(y))
    y += m.norm_way(m.way(x))
    return m.relu(y)


def plain_sum(m: Block, x: Tensor) -> Tensor:
    return m.norm_b(m.b(F.relu(m.nothing(m.norm_a(m.a(x)))))) + m.norm_way(m.way(x))


def added_in_place(m: Block, x: Tensor) -> Tensor:
    y = m.norm_b(m.b(m.norm_a(m.a(x)).relu()))
    y.add_(m.way(x))
    return torch.relu(y)


def seen_twice(m: Block, x: Tensor) -> Tensor:
    y = m.norm_a(m.a(x))
    return F.relu(y) + 0.5 * y


def pooled(m: Block, x: Tensor) -> Tensor:
    y = F.max_pool2d(F.relu(m.norm_a(m.a(x))), 3, 2, 1)
    y = torch.cat([m.b(y), F.avg_pool2d(y, 1)], 1)
    return F.interpolate(y, scale_factor=2).chunk(2, 1)[0]


def viewed(m: Block, x: Tensor) -> Tensor:
    y = m.norm_a(m.a(x))
    n, c, h, w = y.shape
    return F.gelu(y.view(n, c, h * w).transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2))


def changed_since_it_was_recorded(m: Block, x: Tensor) -> Tensor:
    y = m.norm_a(m.a(x))
    z = F.relu(y)
    return z if not CHANGED else z + y.sigmoid()


CHANGED: list[bool] = []


def sum_of_three(m: Block, x: Tensor) -> Tensor:
    return (m.norm_a(m.a(x)) + m.norm_way(m.way(x)) + 1.0).relu_() * 2


def inner_checkpoint(m: Block, x: Tensor) -> Tensor:
    return checkpoint(lambda t: residual(m, t), x, use_reentrant=False)


def joined_and_split(m: Block, x: Tensor) -> Tensor:
    y, way = m.norm_a(m.a(x)), m.norm_way(m.way(x))
    first, _, rest = torch.cat((y, m.norm_b(m.b(F.relu(y))), way), dim=-3).split([12, 5, 19], 1)
    halves = torch.concat([first, F.avg_pool2d(way, 1), rest[:, :3]], 1).chunk(2, 1)
    return halves[0][:, 1:13].relu() + torch.split(torch.cat([*halves[1].chunk(4, -3), way], 1), 12, dim=1)[0]


def written_through_a_view(m: Block, x: Tensor) -> Tensor:
    y = m.norm_a(m.a(x))
    y.view(len(y), -1)[:, :50] = 0.25
    z = m.b(y)
    z.flatten(2).mul_(2.0)
    z.contiguous().add_(y)
    z.view_as(y).mul_(0.5)
    w = m.norm_way(m.way(x))
    w.ravel()[:40] = 0.5
    return m.norm_b(z) + y + w


JOINS = [
    *(residual, plain_sum, added_in_place, seen_twice, pooled, viewed, sum_of_three, inner_checkpoint),
    joined_and_split,
    written_through_a_view,
]


def results(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    images = x.clone().requires_grad_()
    net.zero_grad()
    out = net(images)
    out.square().sum().backward()
    assert images.grad is not None
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "images": images.grad, **grads, **{k: v.clone() for k, v in net.named_buffers()}}


def pair(join: Callable[[Block, Tensor], Tensor], stride: int = 1) -> tuple[growfx.MaskedGraph, growfx.MaskedGraph]:
    torch.manual_seed(0)
    net = growfx.wrap(Block(join, stride), torch.randn(2, 3, 8, 8), density=0.3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
            nn.init.uniform_(module.bias, -1, 1)
    return net, growfx.use_kernels(copy.deepcopy(net), "sparse")


def count_norms(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each norm was computed in the flow."""
    seen: list[bool] = []
    before = flow.Flow._norm

    def counted(self: flow.Flow, *args: object, **kwargs: object) -> object:
        found = before(self, *args, **kwargs)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(flow.Flow, "_norm", counted)
    return seen


@pytest.mark.parametrize("batch", some([20, 32], lambda batch: batch == 20))
@pytest.mark.parametrize("join", JOINS)
def test_any_forward_gives_the_same_as_without_kernels(
    join: Callable[[Block, Tensor], Tensor], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, sparse = pair(join)
    seen = count_norms(monkeypatch)
    x = torch.randn(batch, 3, 8, 8)
    for training in (True, False):
        net.train(training)
        sparse.train(training)
        expected, found = results(net, x), results(sparse, x)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5 * float(value.double().abs().max() + 1))
    assert bool(seen) != (join is inner_checkpoint)
    assert all(seen)


def test_a_forward_that_does_something_else_than_was_recorded_gives_what_it_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, sparse = pair(changed_since_it_was_recorded)
    x = torch.randn(20, 3, 8, 8)
    results(sparse, x)
    results(net, x)
    monkeypatch.setitem(globals(), "CHANGED", [True])
    expected, found = results(net, x), results(sparse, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5 * float(value.double().abs().max() + 1))


KEPT: list[Tensor] = []


def keeps_the_norm(m: Block, x: Tensor) -> Tensor:
    y = m.norm_a(m.a(x))
    KEPT.append(y)
    return F.relu(y)


def keeps_the_norm_of_a_sum(m: Block, x: Tensor) -> Tensor:
    y = m.norm_a(m.a(x))
    KEPT.append(y)
    return F.relu(y + m.way(x))


def keeps_the_sum(m: Block, x: Tensor) -> Tensor:
    y = m.norm_a(m.a(x)) + m.way(x)
    KEPT.append(y)
    return F.relu(y)


def keeps_what_is_added_to(m: Block, x: Tensor) -> Tensor:
    y = m.way(x).clone()
    KEPT.append(y)
    y += m.norm_a(m.a(x))
    return F.relu(y)


def adds_in_place_unseen(m: Block, x: Tensor) -> Tensor:
    y = m.way(x).clone()
    y.add_(m.norm_a(m.a(x)))
    return F.relu(y)


def keeps_a_sum_in_place(m: Block, x: Tensor) -> Tensor:
    y = m.norm_a(m.a(x))
    y.add_(m.way(x))
    KEPT.append(y.detach())
    return F.relu(y)


@pytest.mark.parametrize(
    "join",
    [
        keeps_the_norm,
        keeps_the_norm_of_a_sum,
        keeps_the_sum,
        keeps_what_is_added_to,
        adds_in_place_unseen,
        keeps_a_sum_in_place,
    ],
)
def test_what_a_forward_keeps_has_the_values_and_gradients_it_has_without_kernels(
    join: Callable[[Block, Tensor], Tensor],
) -> None:
    net, sparse = pair(join)
    x, found = torch.randn(20, 3, 8, 8), []
    for one in (net, sparse):
        KEPT.clear()
        out = one(x)
        kept = [value for value in KEPT if value.requires_grad]
        gradient = torch.autograd.grad(sum((t.square().sum() for t in kept), out.sum()), one.get_submodule("a").weight)
        found.append([out, *KEPT, *gradient])
    KEPT.clear()
    assert len(found[0]) == len(found[1])
    for expected, value in zip(*found, strict=True):
        assert value.requires_grad == expected.requires_grad
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-3)


def other_in_evaluation(m: Block, x: Tensor) -> Tensor:
    y = m.norm_a(m.a(x))
    if not m.training:
        y.mul_(2)
        return F.leaky_relu(input=y)
    return F.relu(y)


def changes_what_the_norm_has_read(m: Block, x: Tensor) -> Tensor:
    y = m.a(x)
    z = m.norm_a(y)
    y.mul_(2)
    return F.relu(z + y)


def sometimes_left_out(m: Block, x: Tensor) -> Tensor:
    y = m.norm_a(m.a(x))
    return m.way(x) if CHANGED else m.way(x) + y


@pytest.mark.parametrize("join", [other_in_evaluation, changes_what_the_norm_has_read, sometimes_left_out])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient", some([True, False], bool))
def test_what_no_chain_foresaw_gives_what_torch_gives(
    join: Callable[[Block, Tensor], Tensor], training: bool, gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, sparse = pair(join)
    x = torch.randn(20, 3, 8, 8)
    monkeypatch.setitem(globals(), "CHANGED", [True])
    with torch.set_grad_enabled(gradient):
        expected, found = net.train(training)(x), sparse.train(training)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for (name, before), after in zip(net.named_buffers(), sparse.buffers(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4, msg=name)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * grad


def sometimes_another_function(m: Block, x: Tensor) -> Tensor:
    y = m.norm_a(m.a(x))
    return Double.apply(y) if CHANGED else F.relu(y)


def test_an_autograd_function_that_was_not_recorded_gets_its_gradient_or_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, sparse = pair(sometimes_another_function)
    x = torch.randn(20, 3, 8, 8)
    monkeypatch.setitem(globals(), "CHANGED", [True])
    expected, found = results(net.eval(), x), results(sparse.eval(), x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5 * float(value.double().abs().max() + 1))
    with pytest.raises(growfx.TraceError, match="autograd function"):
        sparse.train()(x)


def checkpointed_from_the_rectification(m: Block, x: Tensor) -> Tensor:
    y = m.norm_a(m.a(x)) + m.way(x)
    y = checkpoint(lambda t: F.relu(t) * 2, y, use_reentrant=True)
    return checkpoint(F.relu, m.norm_b(m.b(y)), use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_part_that_is_checkpointed_by_an_autograd_function_may_begin_behind_a_norm() -> None:
    net, sparse = pair(checkpointed_from_the_rectification)
    x = torch.randn(20, 3, 8, 8)
    expected, found = results(net, x), results(sparse, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5 * float(value.double().abs().max() + 1))


def test_outputs_are_laid_out_as_torch_lays_them_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    net = growfx.use_kernels(growfx.wrap(model, torch.randn(1, 3, 8, 8), density=0.5), "sparse")
    assert net(torch.randn(16, 3, 8, 8)).is_contiguous()


def test_hooks_see_what_they_see_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    net, sparse = pair(residual)
    seen = count_norms(monkeypatch)
    outputs: list[Tensor] = []
    for one in (net, sparse):
        one.get_submodule("norm_a").register_forward_hook(lambda _, __, out: outputs.append(out.detach().clone()))
        one(torch.ones(16, 3, 8, 8).normal_(generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    assert outputs[1].is_contiguous()
    assert not seen


def test_gradients_of_gradients_pass_through_norms() -> None:
    found = []
    for one in pair(residual):
        x = torch.ones(16, 3, 8, 8).normal_(generator=torch.Generator().manual_seed(1)).requires_grad_()
        (gradient,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    for name, value in found[0].items():
        scale = float(value.abs().max() + 1)
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4 * scale)


def test_every_number_of_threads_gives_the_same_bits() -> None:
    _, sparse = pair(residual, 2)
    x, found = torch.randn(70, 3, 16, 16), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        one = copy.deepcopy(sparse)
        found.append(results(growfx.use_kernels(one, "sparse"), x))
    for other in found[1:]:
        for name, value in found[0].items():
            if not name.startswith("fc") and name != "out":  # torch's own products
                torch.testing.assert_close(other[name], value, rtol=0, atol=0)


def test_a_norm_that_stays_constant_and_one_value_a_channel_are_left_to_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    net = growfx.wrap(model, torch.randn(2, 3, 8, 8), density=0.5)
    growfx.use_kernels(net, "sparse")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.randn(1, 3, 3, 3))


def test_what_is_joined_and_split_by_channel_lies_as_before_and_so_do_gradients() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(c, 3, 4, 20).permute(3, 0, 1, 2).requires_grad_() for c in (5, 8))
    lies: dict[str, bool] = {}

    def forward(x: Tensor, y: Tensor) -> Tensor:
        whole = torch.cat([x, y.contiguous(), y], 1)
        head, _, tail = whole.split([4, 7, 10], 1)
        halves = tail.chunk(2, 1)
        lies.update({"whole": flow.is_inner(whole), "half": flow.is_inner(halves[1])})
        whole.register_hook(lambda grad: lies.update(gradient=flow.is_inner(grad)))
        return (head.square().sum() + (halves[0] * halves[1]).sum())[None]

    model = nn.Module()
    model.forward = forward
    found = torch.autograd.grad(flow.Flow({}).run(model, (a, b), {}), (a, b))
    assert lies == {"whole": True, "half": True, "gradient": True}
    for value, expected in zip(found, torch.autograd.grad(forward(a, b), (a, b)), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.filterwarnings("ignore")  # torch's own, about its scripts
def test_forward_derivatives_go_by_the_operators_of_torch() -> None:
    torch.manual_seed(0)
    net, x = growfx.wrap(Block(residual), torch.randn(2, 3, 6, 6), density=0.5), torch.randn(8, 3, 6, 6)
    found = []
    for one in (net, growfx.use_kernels(copy.deepcopy(net), "sparse")):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(one(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
    torch.testing.assert_close(found[1], found[0])


def test_hooks_see_each_gradient_once_where_it_is_differentiated() -> None:
    def join(m: Block, x: Tensor) -> Tensor:
        values = [x, m.a(x)]
        values += [m.norm_a(values[-1])]
        values += [F.max_pool2d(values[-1], 2), torch.cat([values[-1], values[-1]], 1).chunk(2, 1)[1]]
        values += [m.b(values[-1]), m.norm_way(m.way(x))]
        values += [m.norm_b(values[-2]) + values[-1]]
        for value in values if x.requires_grad else ():
            value.register_hook(lambda gradient: 2 * gradient)
        return F.relu(values[-1]) + values[3].mean()

    torch.manual_seed(0)
    net, x = growfx.wrap(Block(join), torch.randn(2, 3, 8, 8), density=0.5), torch.randn(8, 3, 8, 8)
    found = []
    for one in (growfx.use_kernels(copy.deepcopy(net), "sparse"), net):
        images = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(one(images).square().sum(), images, create_graph=True)
        first.square().sum().sqrt().backward()
        found.append({"images": images.grad, **{name: p.grad for name, p in one.named_parameters()}})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def written(x: Tensor) -> Tensor:
    place = torch.empty(6, 4, 20, 5).permute(3, 0, 1, 2)
    torch.cat([x.detach(), x.detach()], 1, out=place)
    return place * x.sum()


@pytest.mark.parametrize(
    "join",
    [
        lambda x: torch.cat([x[:, :1].expand(-1, 5, -1, -1), x], 1),
        lambda x: torch.cat([x[:, :, :1].expand(-1, -1, 4, -1), x], 1),
        lambda x: torch.cat([x.transpose(1, 2), x.transpose(1, 2)], 1),
        lambda x: torch.cat([x[..., :3], x[:, ::2, :, 1:4]], 1).relu_(),
        lambda x: torch.cat(torch.chunk(input=x, chunks=2, dim=1)[::-1], 1),
        lambda x: torch.max_pool2d(input=x, kernel_size=2),
        written,
    ],
)
def test_joined_split_and_pooled_views_have_the_values_of_torch(join: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, 20, 5).permute(3, 0, 1, 2).requires_grad_()
    model = nn.Module()
    model.forward = join
    expected, found = join(x), flow.Flow({}).run(model, (x,), {})
    torch.testing.assert_close(found, expected)
    wanted = torch.randn(expected.shape)
    gradients = (torch.autograd.grad(one, x, wanted)[0] for one in (found, expected))
    torch.testing.assert_close(next(gradients), next(gradients))


@pytest.mark.parametrize(
    "wrong",
    [
        *(lambda x: x.split([1, 2], 1), lambda x: torch.cat([x, x[:3]], 1), lambda x: x.chunk(0, 1), torch.cat),
        lambda x: torch.cat([x, torch.tensor(1.0)], 1),
    ],
)
def test_wrong_joins_and_splits_raise_as_in_torch(wrong: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, 3, 4, 20).permute(3, 0, 1, 2).requires_grad_()
    with pytest.raises((RuntimeError, TypeError)) as plain:
        wrong(x)
    model = nn.Module()
    model.forward = wrong
    with pytest.raises(plain.type) as within:
        flow.Flow({}).run(model, (x,), {})
    assert str(within.value) == str(plain.value)
