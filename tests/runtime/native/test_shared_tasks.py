"""Threads that share the tasks of a step: the same numbers for any number of them, however late they come."""

import threading
from pathlib import Path

import pytest
import torch
from native_nets import native
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.errors import ConfigError
from growfx.runtime.native.library import NativeNetwork, library_status

pytestmark = pytest.mark.skipif(bool(library_status()), reason=library_status() or "the library is there")


class Mixed(nn.Module):
    """Steps of one task, of a few and of many, whose units no number of threads divides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 13, 3, stride=2, padding=1)
        self.wide, self.depthwise = nn.Conv2d(13, 37, 1), nn.Conv2d(37, 37, 5, padding=2, groups=37)
        self.narrow, self.gate = nn.Conv2d(37, 11, 1), nn.Linear(37, 37)
        self.norm, self.head = nn.LayerNorm(11), nn.Linear(11, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(self.wide(F.max_pool2d(self.stem(x), 3, 2, 1)).relu()))
        x = self.narrow(x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None])
        return self.head(self.norm(x.flatten(2).transpose(1, 2))).softmax(-1)


@pytest.fixture
def case() -> tuple[growfx.MaskedGraph, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 150, 142)
    return growfx.wrap(Mixed(), x, density=0.4).eval(), x


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_any_number_of_threads_gives_the_bits_of_one(case: tuple[growfx.MaskedGraph, Tensor], threads: int) -> None:
    net, x = case
    one, several = native(net, x[:1]), native(net, x[:1], threads=threads)
    for batch in (x, x[:1]):
        expected = one(batch)[0]
        with torch.no_grad():
            assert torch.allclose(expected, net(batch), rtol=1e-4, atol=1e-6)
        for _ in range(20):
            assert torch.equal(several(batch)[0], expected)


def test_networks_with_more_threads_than_cores_do_not_wait_for_each_other(
    case: tuple[growfx.MaskedGraph, Tensor],
) -> None:
    net, x = case
    networks = [native(net, x[:1], threads=6) for _ in range(3)]
    expected, wrong = native(net, x[:1])(x)[0], []

    def call(network: NativeNetwork) -> None:
        wrong.extend(i for i in range(15) if not torch.equal(network(x)[0], expected))

    callers = [threading.Thread(target=call, args=(network,), daemon=True) for network in networks]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong


@pytest.mark.parametrize(("rows", "columns", "stride", "threads"), [(57, 9, 1, 8), (10, 16, 2, 3)])
def test_bands_that_end_in_a_short_one_add_up_in_the_same_order(
    rows: int, columns: int, stride: int, threads: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 12, rows * stride, columns * stride)
    window = 3 if stride == 1 else 1
    net = growfx.wrap(nn.Sequential(nn.Conv2d(12, 16, window, stride, window // 2)), x, density=0.5).eval()
    assert torch.equal(native(net, x, threads=threads)(x)[0], native(net, x)(x)[0])


def test_threads_that_the_system_does_not_give_are_an_error_after_which_the_network_runs(
    case: tuple[growfx.MaskedGraph, Tensor],
) -> None:
    resource = pytest.importorskip("resource")
    sizes = Path("/proc/self/statm")
    if not sizes.exists():
        pytest.skip("how much memory is in use is not known here")
    net, x = case
    network = native(net, x[:1], threads=2)
    expected = network(x)[0]
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(sizes.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), before[1]))  # room for the stacks of some
    try:
        with pytest.raises(ConfigError):
            network.set_threads(256)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert torch.equal(network(x)[0], expected)
