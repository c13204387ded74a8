"""Sparse kernels against torch's dense ones: outputs and gradients, for every geometry and layout."""

import copy
from typing import Any

import pytest
import torch
from breadth import some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import growfx
from growfx.runtime.train.entries import Entries, Geometry, geometry_of, product
from growfx.runtime.train.library import training_status

built = pytest.mark.skipif(bool(training_status()), reason=training_status() or "the kernels are there")
pytestmark = built

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    axes = draw(st.sampled_from([0, 1, 2, 2, 2, 3]))
    numbers = {
        name: [draw(st.integers(low, high)) for _ in range(axes)]
        for name, low, high in [
            ("kernel", 1, 4),
            ("stride", 1, 3),
            ("dilation", 1, 3),
            ("padding", 0, 4),
            ("more", 0, 7),
        ]
    }
    reach = [d * (k - 1) + 1 for d, k in zip(numbers["dilation"], numbers["kernel"], strict=True)]
    size = [max(1, r - 2 * p) + m for r, p, m in zip(reach, numbers["padding"], numbers["more"], strict=True)]
    return {
        **numbers,
        "size": size,
        "batch": draw(st.sampled_from([1, 2, 7, 16, 17, 33, 48, 130])),
        "channels": (draw(st.integers(1, 6)), draw(st.integers(1, 6))),
        "groups": draw(st.sampled_from([1, 1, 2, 5])) if axes else 1,  # each has those channels
        "density": draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        "bias": draw(st.booleans()),
        "same": draw(st.booleans()),
        "channels_last": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def layer_of(case: dict[str, Any]) -> nn.Module:
    groups = case["groups"]
    inputs, outputs = (count * groups for count in case["channels"])
    if not case["kernel"]:
        return nn.Linear(inputs, outputs, bias=case["bias"])
    same = case["same"] and all(s == 1 for s in case["stride"])
    geometry = {"stride": case["stride"], "dilation": case["dilation"], "padding": "same" if same else case["padding"]}
    return CONVOLUTIONS[len(case["size"])](
        inputs, outputs, case["kernel"], bias=case["bias"], groups=groups, **geometry
    )


def results(net: nn.Module, x: Tensor, gradient: Tensor | None = None) -> dict[str, Tensor]:
    """Output and all gradients of one step."""
    net.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = net(x)
    y.backward(torch.ones_like(y) if gradient is None else gradient)
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": y.detach(), "input": x.grad, **grads}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        error = (found[name] - value).abs().max() if value.numel() else torch.zeros(())
        assert error <= relative * value.abs().max() + 1e-6, name


def masked_layer(case: dict[str, Any]) -> tuple[growfx.MaskedGraph, Tensor]:
    torch.manual_seed(case["seed"])
    inputs = case["channels"][0] * case["groups"]
    shape = (
        (case["batch"], *(case["size"] or [3]), inputs)
        if not case["kernel"]
        else (case["batch"], inputs, *case["size"])
    )
    x = torch.randn(shape)
    net = growfx.wrap(nn.Sequential(layer_of(case)), x[:1])
    net.set_masks({"0": torch.rand(net.layers["0"].mask.shape) < case["density"]})
    if case["channels_last"] and len(case["size"]) == 2:
        net.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    return net, x


@pytest.mark.parametrize("examples", some([15, 60], lambda count: count == 15))
def test_any_layer_gives_what_torchs_dense_kernels_give(examples: int) -> None:
    settings(max_examples=examples, deadline=None, derandomize=True)(given(cases())(assert_like_dense))()


def assert_like_dense(case: dict[str, Any]) -> None:
    net, x = masked_layer(case)
    gradient = torch.randn_like(net(x))
    expected = results(net, x, gradient)
    growfx.use_kernels(net, "sparse")
    found = results(net, x, gradient)
    assert net.kernel_report.layers["0"].kernel == "sparse"
    assert_close(found, expected)
    assert not found["0.weight"][~net.layers["0"].mask].any()


def by_panels(net: growfx.MaskedGraph, x: Tensor, gradient: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients of the one layer of `net` by panels of dense rows."""
    layer: Any = net.layers["0"]
    geometry = geometry_of(layer)
    assert isinstance(geometry, Geometry)
    weight, bias = layer.parameter.detach().clone(memory_format=torch.preserve_format).requires_grad_(), layer.bias
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    size = geometry.out_size(tuple(x.shape[2:])) if geometry.kernel else []
    entries = Entries.of(layer.mask, weight.stride(), geometry, size)
    y = product(x, weight, bias, entries, geometry, size, panels=True)
    wanted = [x, weight] if bias is None else [x, weight, bias]
    grads = torch.autograd.grad(y, wanted, torch.ones_like(y) if gradient is None else gradient)
    return dict(zip(("output", "input", "0.weight", "0.bias"), (y.detach(), *grads), strict=False))


@pytest.mark.parametrize("examples", some([15, 60], lambda count: count == 15))
def test_any_layer_by_panels_gives_what_torchs_dense_kernels_give(examples: int) -> None:
    settings(max_examples=examples, deadline=None, derandomize=True)(given(cases())(assert_panels_like_dense))()


def assert_panels_like_dense(case: dict[str, Any]) -> None:
    net, x = masked_layer(case)
    gradient = torch.randn_like(net(x))
    found = by_panels(net, x, gradient)
    assert_close(found, results(net, x, gradient))
    assert not found["0.weight"][~net.layers["0"].mask].any()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(cases())
def test_panels_give_the_same_bits_for_every_number_of_threads(case: dict[str, Any]) -> None:
    net, x = masked_layer(case | {"batch": 70, "channels": (24, 41), "density": 0.7})
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(by_panels(net, x))
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@settings(max_examples=10, deadline=None, derandomize=True)
@given(cases())
def test_every_number_of_threads_gives_the_same_bits(case: dict[str, Any]) -> None:
    net, x = masked_layer(case | {"batch": 70, "channels": (24, 40), "density": 0.3})
    growfx.use_kernels(net, "sparse")
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(results(net, x))
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_tiles_that_share_outputs_do_not_add_to_each_other_in_several_threads() -> None:
    torch.manual_seed(0)
    net = growfx.wrap(nn.Sequential(nn.Conv2d(64, 32, 3, padding=1)), torch.randn(1, 64, 12, 12), density=0.3)
    growfx.use_kernels(net, "sparse")
    x = torch.randn(70, 64, 12, 12)  # ends within a register, and has several blocks of channels
    torch.set_num_threads(1)
    expected = results(net, x)
    torch.set_num_threads(4)
    for _ in range(5):
        assert all(torch.equal(value, expected[name]) for name, value in results(net, x).items())


def test_linear_layers_take_any_leading_shape() -> None:
    torch.manual_seed(0)
    for shape in ((20,), (3, 20), (2, 3, 4, 20)):
        x = torch.randn(shape)
        net = growfx.wrap(nn.Sequential(nn.Linear(20, 7)), x, density=0.3)
        expected = results(net, x)
        growfx.use_kernels(net, "sparse")
        assert_close(results(net, x), expected)
        assert net.kernel_report.layers["0"].kernel == "sparse"


def network(density: float = 0.2) -> tuple[growfx.MaskedGraph, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(
        # Without biases: before a norm their gradients are nothing but rounding.
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(
            nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 5),
        ),
    )
    x = torch.randn(20, 3, 9, 9)
    return growfx.wrap(model, x[:2], density=density), x


def both() -> tuple[growfx.MaskedGraph, growfx.MaskedGraph, Tensor]:
    net, x = network()
    sparse = copy.deepcopy(net)
    return net, growfx.use_kernels(sparse, "sparse"), x


def test_steps_of_training_stay_together_with_dense_ones() -> None:
    net, sparse, x = both()
    for one in (net, sparse):
        optimizer = torch.optim.SGD(one.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        for _ in range(5):
            nn.functional.cross_entropy(one(x), torch.arange(20) % 5).backward()
            optimizer.step()
            optimizer.zero_grad()
        one.verify()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_second_derivatives_are_those_of_dense_layers() -> None:
    net, sparse, x = both()
    found = []
    for one in (net, sparse):
        images = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(one(images).square().sum(), images, create_graph=True)
        gradient.square().sum().backward()
        found.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert_close(found[1], found[0], 1e-4)


def test_autocast_computes_within_the_error_of_bfloat16() -> None:
    net, sparse, x = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = net(x), sparse(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert sparse.kernel_report.layers["0"].kernel == "sparse"
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in sparse.parameters())


def test_checkpointed_activations_give_the_same_gradients() -> None:
    _, sparse, x = both()
    expected = results(sparse, x)
    found = {name.removeprefix("net."): value for name, value in results(Checkpointed(sparse), x).items()}
    assert_close(found, expected)


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False, preserve_rng_state=False)


def test_infinities_reach_the_outputs_that_active_weights_connect_them_to() -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(2, 2, bias=False)), torch.ones(1, 2))
    net.set_masks({"0": torch.tensor([[True, False], [False, True]])})
    growfx.use_kernels(net, "sparse")
    y = net(torch.tensor([[float("inf"), 1.0]]))
    assert torch.isinf(y[0, 0])
    assert torch.isfinite(y[0, 1])
