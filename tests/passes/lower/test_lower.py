"""The lowering pass: the same outputs by every kernel, and what a layer may take over."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import pytest
import torch
from breadth import some
from lower_nets import NETS, make, recorded, same
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.errors import ConfigError
from growfx.passes.lower.layers import lower, lowerable
from growfx.runtime import sparse_kernel
from growfx.runtime.layer_kernels import CHOICES
from growfx.runtime.lowered_layer import LoweredLayer
from growfx.runtime.max_pool import max_pool2d

X = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(7))


def need(choice: str) -> None:
    if choice == "direct" and sparse_kernel.kernel_status():
        pytest.skip(sparse_kernel.kernel_status())


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", some(NETS, lambda one: one in list(NETS)[::2]))
def test_every_choice_gives_the_same_outputs(kind: str, choice: str) -> None:
    need(choice)
    module, masks = recorded(make(kind), X)
    names = [name for name, reason in lowerable(module, module.graph).items() if not reason]
    lowered = lower(module, dict.fromkeys(names, choice), masks)
    assert {m.kernel.choice for m in lowered.modules() if isinstance(m, LoweredLayer)} == {choice}
    with torch.no_grad():
        for rows in (1, 3):
            x = X.repeat(rows, 1, 1, 1) * torch.arange(1, rows + 1).view(-1, 1, 1, 1)
            same(lowered(x.clone()), module(x.clone()))
        assert lowered(X[:0]).shape == (0, 5)


@pytest.mark.parametrize("choice", CHOICES)
def test_weights_outside_the_mask_are_never_read(choice: str) -> None:
    need(choice)
    module, masks = recorded(make("residual"), X)
    names = [name for name, reason in lowerable(module, module.graph).items() if not reason]
    with torch.no_grad():
        expected = module(X)
        for name in names if choice != "dense" else []:
            module.get_submodule(name).weight[~masks[name]] = torch.nan
        same(lower(module, dict.fromkeys(names, choice), masks)(X), expected)


@pytest.mark.parametrize("choice", CHOICES)
def test_empty_layers_give_their_bias(choice: str) -> None:
    need(choice)
    net = make("residual")
    net.set_masks({name: torch.zeros_like(layer.mask) for name, layer in net.layers.items()})
    module, masks = recorded(net, X)
    names = [name for name, reason in lowerable(module, module.graph).items() if not reason]
    with torch.no_grad():
        same(lower(module, dict.fromkeys(names, choice), masks)(X), module(X))


def test_layers_that_compute_in_their_own_way_stay() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.doubled, self.grouped = Doubled(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2)
            self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
            self.uneven = nn.Conv2d(4, 4, 2, padding="same")
            self.line, self.read, self.good = nn.Conv1d(4, 4, 1), nn.Linear(4, 4), nn.Linear(4, 4)
            self.hooked = nn.Linear(4, 4)
            self.hooked.register_forward_hook(lambda m, args, y: y.add(1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.uneven(self.reflect(self.grouped(self.doubled(x))))
            x = self.hooked(self.read(self.line(x.flatten(2)).mean(-1)))
            return F.linear(self.good(x), self.read.weight)

    net = growfx.wrap(Odd().eval(), X).eval()
    module, _ = recorded(net, X)
    reasons = lowerable(growfx.unwrap(net).eval(), module.graph)
    assert reasons.pop("good") == ""
    assert reasons == {
        "doubled": "a `Doubled` has its own forward",
        "grouped": "it has 2 groups",
        "reflect": "it pads with `reflect`",
        "uneven": '`padding="same"` adds unequal zeros on the two sides',
        "line": "a `Conv1d` has no sparse kernel",
        "read": "its weight is used without a call of it",
        "hooked": "it has hooks",
    }
    with pytest.raises(ConfigError, match="`grouped` cannot be lowered: it has 2 groups"):
        lower(module, {"grouped": "dense"})


def test_wrong_names_and_choices_are_refused() -> None:
    module, _ = recorded(make("residual"), X)
    with pytest.raises(ConfigError, match="unknown choice `block` for `stem`; allowed: dense, csr, direct"):
        lower(module, {"stem": "block"})
    with pytest.raises(ConfigError, match="`norm` is not a convolution or linear layer that the graph calls"):
        lower(module, {"norm": "dense"})


def test_a_choice_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module, masks = recorded(make("residual"), X)
    monkeypatch.setattr(sparse_kernel, "kernel_status", lambda: "no C++ compiler")
    with pytest.raises(ConfigError, match="`stem` cannot be lowered to `direct`: no C\\+\\+ compiler"):
        lower(module, {"stem": "direct"}, masks)
    half = module.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"`stem` cannot be lowered to `csr`: torch has no sparse product of torch.b"):
        lower(half, {"stem": "csr"}, masks)


# -- what a layer may take over ----------------------------------------------------------------------------------------


class Steps(nn.Module):
    """Two layers and a function of them."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.a, self.b, self.step, self.act = nn.Linear(4, 4), nn.Linear(4, 4), step, nn.ReLU()
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def clobbered(s: Steps, x: Tensor) -> Tensor:
    h = x * 2
    y = s.a(h)
    h.add_(1)
    return (y + h).relu()


FUSED = {
    "relu": (lambda s, x: s.act(s.a(x)), 1),
    "relu after a sum": (lambda s, x: (s.a(x) + x).relu(), 2),
    "the later of two layers": (lambda s, x: F.relu(s.a(x) + s.b(x)), 2),
    "in place": (lambda s, x: operator.iadd(s.a(x), x).relu_(), 2),
    "two sums": (lambda s, x: s.a(x) + x + x, 1),
    "relu before a sum": (lambda s, x: s.a(x).relu() + x, 1),
    "someone else reads the layer": (lambda s, x: torch.cat([(y := s.a(x)), y.relu()]), 0),
    "someone else reads the sum": (lambda s, x: torch.cat([(y := s.a(x) + x), y.relu()]), 1),
    "a sum with itself": (lambda s, x: (y := s.a(x)) + y, 0),
    "a sum with a number": (lambda s, x: s.a(x) + 1, 0),
    "a scaled sum": (lambda s, x: torch.add(s.a(x), x, alpha=2), 0),
    "a sum with another type": (lambda s, x: operator.iadd(s.a(x), x.double()), 0),
    "a sum that broadcasts": (lambda s, x: s.a(x) + x[:, :1], 0),
    "a sum with a parameter": (lambda s, x: s.a(x) + s.shift, 0),
    "its input changes before the sum": (clobbered, 0),
    "the sum is written into another tensor": (lambda s, x: torch.cat([h := x * 2, h.add_(s.a(x)), h]), 0),
}


@pytest.mark.parametrize("case", some(FUSED, lambda one: one in list(FUSED)[::2]))
def test_a_layer_takes_over_what_only_it_feeds(case: str) -> None:
    step, count = FUSED[case]
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    module, _ = recorded(growfx.wrap(Steps(step).eval(), x).eval(), x)
    names = list(lowerable(module, module.graph))
    lowered = lower(module, dict.fromkeys(names, "dense"))
    assert len(module.graph.nodes) - len(lowered.graph.nodes) == count
    with torch.no_grad():
        same(lowered(x.clone()), module(x.clone()))


def test_max_pools_are_those_of_torch_bit_for_bit() -> None:
    cases = itertools.product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (1, 2), (False, True), (5, 8, 13))
    for size, stride, padding, dilation, ceil_mode, height in cases:
        if padding > size // 2 or dilation * (size - 1) >= height + 2 * padding:
            continue
        x = torch.randn(2, 3, height, height + 2, generator=torch.Generator().manual_seed(0))
        x[0, 0, 1, 1], x[0, 1] = torch.nan, -torch.inf
        pairs = [(size, size), (stride, stride), (padding, padding), (dilation, dilation)]
        expected = F.max_pool2d(x, size, stride, padding, dilation, ceil_mode)
        for given in (x, x.to(memory_format=torch.channels_last), x[1]):
            got = max_pool2d(given, *pairs, ceil_mode)
            torch.testing.assert_close(
                got, expected[1] if given.ndim == 3 else expected, rtol=0, atol=0, equal_nan=True
            )
    empty = torch.empty(0, 3, 8, 8)
    assert max_pool2d(empty, (2, 2), (2, 2), (0, 0), (1, 1), False).shape == (0, 3, 4, 4)


def test_max_pools_of_plain_windows_are_replaced() -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.hooked = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 1))
            self.indices = nn.MaxPool2d(2, return_indices=True)
            self.hooked.register_forward_hook(lambda m, args, y: y.add(1))

        def forward(self, x: Tensor) -> list[Tensor]:
            x = F.max_pool2d(self.hooked(self.pool(x)), [2, 1], stride=1, padding=(1, 0), ceil_mode=True)
            return [F.max_pool2d(x, 2, x.shape[-1] // 4), torch.max_pool2d(x, 2), *self.indices(x)]

    x = torch.randn(2, 3, 33, 33)
    module, _ = recorded(growfx.wrap(Pools().eval(), x).eval(), x)
    lowered = lower(module, {})
    assert sum(node.target is max_pool2d for node in lowered.graph.nodes) == 4  # that of the hooked one, and its hook
    for got, expected in zip(lowered(x), module(x), strict=True):
        assert torch.equal(got, expected)


def test_a_lowered_layer_knows_the_sizes_of_the_layer_it_stands_for() -> None:
    module, masks = recorded(make("residual"), X)
    layer = lower(module, {"stem": "csr"}, masks).get_submodule("stem")
    assert (layer.in_channels, layer.weight.shape, layer.weight.dtype) == (3, (8, 3, 3, 3), torch.float32)
    # Code may ask where it is, but must not compute with it.
    assert layer.weight.device.type == "cpu"
    assert bool(layer.weight.isnan().all())
    assert layer.weight.untyped_storage().nbytes() == 4
    assert torch.equal(
        lower(module, {"stem": "dense"}).get_submodule("stem").weight, module.get_submodule("stem").weight
    )
    assert layer(torch.empty(2, 3, 12, 12, device="meta"), relu=True).shape == (2, 8, 12, 12)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        layer.nothing  # noqa: B018
