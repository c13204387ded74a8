"""Masked twins: the effective weight is where(mask, weight, 0) whatever happens to weight, mask and optimizer."""

import copy
import pickle

import pytest
import torch
from torch import nn

import growfx
from growfx.masked.gradients import mask_in_place
from growfx.masked.layers import MaskedLayer
from growfx.masked.twins import masked_class, to_plain, to_twin

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


def small_net(density: float = 0.3) -> growfx.MaskedGraph:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )
    return growfx.wrap(model, torch.randn(2, 3, 6, 6), density=density)


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss = nn.functional.cross_entropy(net(torch.randn(4, 3, 6, 6)), torch.randint(0, 5, (4,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def random_masks(net: growfx.MaskedGraph, density: float) -> dict[str, torch.Tensor]:
    return {name: torch.rand(layer.mask.shape) < density for name, layer in net.layers.items()}


def outside(layer: MaskedLayer) -> torch.Tensor:
    return layer.parameter.detach()[~layer.mask]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_outside_the_mask_stay_plus_zero_under_any_optimizer(name: str) -> None:
    net = small_net()
    net.train()
    optimizer = OPTIMIZERS[name](net.parameters())
    for step in range(9):
        train_step(net, optimizer)
        net.verify()
        if step % 3 == 2:
            for layer_name, mask in random_masks(net, 0.4).items():
                net.layers[layer_name].mask.copy_(mask)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_edges_outside_the_mask_carry_no_optimizer_state_after_a_step(name: str) -> None:
    net = small_net()
    net.train()
    optimizer = OPTIMIZERS[name](net.parameters())
    for density in (0.5, 0.2):
        train_step(net, optimizer)
        net.set_masks(random_masks(net, density))
    train_step(net, optimizer)
    for layer in net.layers.values():
        for value in optimizer.state[layer.parameter].values():
            if isinstance(value, torch.Tensor) and value.shape == layer.mask.shape:
                assert not value[~layer.mask].any()
                assert value[layer.mask].any()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_edit_of_the_parameter_outside_the_mask_has_no_effect(mode: str) -> None:
    net = small_net().train(mode == "train")
    layer = next(iter(net.layers.values()))
    x = torch.randn(4, 3, 6, 6)
    net(x)
    with torch.no_grad():
        layer.parameter.normal_()
    expected = nn.functional.conv2d(x, torch.where(layer.mask, layer.parameter, 0), padding=1)
    seen = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(output=output))
    net(x)
    assert torch.equal(seen["output"], expected)


def test_an_edit_through_data_is_mended_by_the_next_training_forward_and_left_out_of_what_is_saved() -> None:
    net = small_net().train()
    for layer in net.layers.values():
        layer.parameter.data.fill_(-1.0)
    saved = net.state_dict()
    for name, layer in net.layers.items():
        assert torch.equal(saved[f"{name}.weight"], torch.where(layer.mask, -1.0, 0.0))
        # Whoever averages into a state dict writes to the network: the values are its own, and zero outside the masks.
        assert saved[f"{name}.weight"].data_ptr() == layer.parameter.data_ptr()
    net.verify()
    for layer in net.layers.values():
        layer.parameter.data.fill_(-1.0)
    with pytest.raises(growfx.MaskError, match="outside the mask"):
        net.verify()
    net(torch.randn(4, 3, 6, 6))
    net.verify()


WRITES = {
    "data": lambda parameter, value: parameter.data.copy_(value),
    "numpy": lambda parameter, value: parameter.detach().numpy().__setitem__(..., value.numpy()),
    "foreach": lambda parameter, value: torch._foreach_copy_([parameter.data], [value]),
    "no_grad": lambda parameter, value: parameter.copy_(value),
    "another storage": lambda parameter, value: setattr(parameter, "data", value.clone()),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_no_write_to_a_weight_goes_unseen(write, training, gradients) -> None:
    net = small_net().train(training)
    x = torch.randn(4, 3, 6, 6)
    net(x)
    values = {name: torch.randn_like(layer.parameter) for name, layer in net.layers.items()}
    with torch.no_grad():
        for name, layer in net.layers.items():
            WRITES[write](layer.parameter, values[name])
    plain = growfx.unwrap(net)
    for name, layer in net.layers.items():
        assert torch.equal(plain.get_parameter(f"{name}.weight"), torch.where(layer.mask, values[name], 0))
    with torch.set_grad_enabled(gradients):
        assert torch.equal(net(x), plain(x))


MASK_WRITES = {
    "copy_": lambda layer, mask: layer.mask.copy_(mask),
    "data": lambda layer, mask: layer.mask.data.copy_(mask),
    "numpy": lambda layer, mask: layer.mask.numpy().__setitem__(..., mask.numpy()),
    "another tensor": lambda layer, mask: layer._buffers.__setitem__("mask", mask.clone()),
    "registered": lambda layer, mask: layer.register_buffer("mask", mask.clone()),
}


@pytest.mark.parametrize("write", MASK_WRITES)
@pytest.mark.parametrize("training", [True, False])
def test_no_write_to_a_mask_goes_unseen(write, training) -> None:
    net = small_net().train(training)
    x = torch.randn(4, 3, 6, 6)
    net(x)
    masks = {name: torch.rand(layer.mask.shape) < 0.5 for name, layer in net.layers.items()}
    for name, layer in net.layers.items():
        MASK_WRITES[write](layer, masks[name])
    assert net.nnz == sum(int(mask.sum()) for mask in masks.values())
    plain = growfx.unwrap(net)
    assert torch.equal(net(x), plain(x))
    # A mask that grew lets the gradient of its new edges through.
    net(x).square().sum().backward()
    plain(x).square().sum().backward()
    for name, layer in net.layers.items():
        wanted = torch.where(masks[name], plain.get_parameter(f"{name}.weight").grad, 0)
        torch.testing.assert_close(layer.parameter.grad, wanted)


def test_the_gradient_is_that_of_the_masked_weight_and_zero_outside() -> None:
    net = small_net()
    net.train()
    x, y = torch.randn(4, 3, 6, 6), torch.randint(0, 5, (4,))
    nn.functional.cross_entropy(net(x), y).backward()
    plain = growfx.unwrap(net).train()
    nn.functional.cross_entropy(plain(x), y).backward()
    for name, layer in net.layers.items():
        expected = plain.get_submodule(name).get_parameter("weight").grad
        assert torch.equal(layer.parameter.grad, torch.where(layer.mask, expected, 0))


def test_gradients_of_one_weight_used_twice_are_masked_once_and_added() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.layer(x))) + x @ self.layer.weight

    net = growfx.wrap(Twice(), torch.randn(2, 6), density=0.5)
    net.train()
    x = torch.randn(4, 6)
    net(x).pow(2).sum().backward()
    plain = growfx.unwrap(net)
    plain(x).pow(2).sum().backward()
    layer = net.layers["layer"]
    torch.testing.assert_close(layer.parameter.grad, torch.where(layer.mask, plain.layer.weight.grad, 0))


def test_two_forwards_before_one_backward_add_their_masked_gradients() -> None:
    net = small_net()
    net.train()
    layer = net.layers["4"]
    xs = torch.randn(2, 4, 3, 6, 6)
    single = [torch.autograd.grad(net(x).sum(), layer.parameter)[0] for x in xs]
    (net(xs[0]).sum() + net(xs[1]).sum()).backward()
    torch.testing.assert_close(layer.parameter.grad, single[0] + single[1])
    assert not layer.parameter.grad[~layer.mask].any()


def test_a_weight_changed_between_forward_and_backward_is_still_noticed() -> None:
    net = small_net()
    net.train()
    net(torch.randn(4, 3, 6, 6))
    out = net(torch.randn(4, 3, 6, 6, requires_grad=True)).sum()
    with torch.no_grad():
        net.layers["4"].parameter.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_weights_put_in_by_data_assignment_are_masked_and_trained() -> None:
    net = small_net()
    net.train()
    layer = net.layers["4"]
    x = torch.randn(4, 3, 6, 6)
    net(x).sum().backward()
    layer.parameter.data = torch.ones_like(layer.parameter)
    layer.parameter.grad = None
    expected = growfx.unwrap(net).train()(x)
    torch.testing.assert_close(net(x), expected)
    net(x).sum().backward()
    assert layer.parameter.grad[layer.mask].any()
    net.verify()


def test_second_derivatives_go_through_the_mask() -> None:
    net = small_net()
    net.train()
    weight = net.layers["0"].parameter
    out = net(torch.randn(4, 3, 6, 6)).pow(3).sum()
    (grad,) = torch.autograd.grad(out, weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), weight)
    assert not second[~net.layers["0"].mask].any()
    assert second[net.layers["0"].mask].any()


def test_masking_in_place_clears_infinities_nans_and_signs() -> None:
    values = torch.tensor([1.0, -2.0, float("inf"), float("nan"), -3.0])
    mask_in_place(values, torch.tensor([True, False, False, False, True]))
    assert values.tolist() == [1.0, 0.0, 0.0, 0.0, -3.0]
    assert not torch.signbit(values[1:4]).any()


def layouts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The same values, lying differently in memory."""
    return [
        tensor,
        tensor.to(memory_format=torch.channels_last),
        tensor.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([tensor, tensor])[: len(tensor)],
    ]


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (7, 4, 1, 1), (4, 1, 3, 3), (700, 100, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masking_in_place_is_right_in_every_layout_size_and_type(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    original, mask = torch.randn(shape).to(dtype), torch.rand(shape) < 0.4
    for keep in layouts(mask):
        for values in layouts(original):
            copy = values.clone(memory_format=torch.preserve_format)
            assert mask_in_place(copy, keep) is copy
            assert torch.equal(copy, torch.where(mask, original, 0))
            assert not torch.signbit(copy[~mask]).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_after_training_keeps_the_mask(dtype: torch.dtype) -> None:
    net = small_net()
    net.train()
    net(torch.randn(4, 3, 6, 6))
    net.to(dtype)
    out = net(torch.randn(4, 3, 6, 6, dtype=dtype))
    out.sum().backward()
    net.verify()
    for layer in net.layers.values():
        assert not layer.parameter.grad[~layer.mask].any()


def test_a_copy_in_eval_mode_has_the_masks_of_its_moment() -> None:
    net = small_net()
    net.train()
    net(torch.randn(4, 3, 6, 6))
    average = copy.deepcopy(net).eval()
    masks = {name: layer.mask.clone() for name, layer in net.layers.items()}
    net.set_masks(random_masks(net, 0.9))
    for name, layer in average.layers.items():
        assert torch.equal(layer.mask, masks[name])
        assert layer.parameter is not net.layers[name].parameter


def test_a_copy_sees_every_edit_of_its_own_mask() -> None:
    net = small_net()
    net.train()
    for edits in range(4):
        for _ in range(edits):
            net.layers["0"].mask.copy_(torch.rand(net.layers["0"].mask.shape) < 0.5)
        net(torch.randn(4, 3, 6, 6))
        average = copy.deepcopy(net)
        for _ in range(3):
            average.layers["0"].mask.copy_(torch.zeros_like(net.layers["0"].mask))
            assert average.layers["0"].nnz == 0
            average.layers["0"].mask.copy_(torch.ones_like(net.layers["0"].mask))
            assert average.layers["0"].nnz == average.layers["0"].numel


def test_a_twin_is_an_instance_of_the_original_class_and_pickles() -> None:
    layer = to_twin(nn.Linear(3, 4))
    assert isinstance(layer, nn.Linear)
    assert type(layer) is masked_class(nn.Linear)
    assert type(layer).__name__ == "MaskedLinear"
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer)
    assert torch.equal(again.weight, layer.weight)


def test_a_plain_layer_again_has_no_trace_of_its_mask() -> None:
    layer = to_twin(nn.Linear(3, 4))
    layer.mask[0] = False
    plain = to_plain(layer)
    assert type(plain) is nn.Linear
    assert set(plain.state_dict()) == {"weight", "bias"}
    assert not plain.weight[0].any()
    assert not torch.signbit(plain.weight[0]).any()


def test_a_standardised_convolution_standardises_the_masked_parameter() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    conv = timm_layers.ScaledStdConv2d(4, 6, 3, padding=1)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(6 * 16, 3))
    net = growfx.wrap(model, torch.randn(2, 4, 4, 4), density=0.4)
    x = torch.randn(3, 4, 4, 4)
    plain = growfx.unwrap(net)
    for mode in (True, False):
        torch.testing.assert_close(net.train(mode)(x), plain.train(mode)(x))
    net.train()(x).sum().backward()
    assert not net.layers["0"].parameter.grad[~net.layers["0"].mask].any()


def test_attention_masks_its_joint_projection_and_its_output_projection() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    net = growfx.wrap(Block(), torch.randn(2, 5, 8), density=0.5)
    assert list(net.layers) == ["attention", "attention.out_proj"]
    assert net.layers["attention"].weight is net.get_parameter("attention.in_proj_weight")
    x = torch.randn(3, 5, 8)
    plain = growfx.unwrap(net)
    for mode in (True, False):
        torch.testing.assert_close(net.train(mode)(x), plain.train(mode)(x))
    net.train()(x).sum().backward()
    for layer in net.layers.values():
        assert not layer.parameter.grad[~layer.mask].any()
    net.verify()


def test_counts_follow_the_mask_however_it_is_changed() -> None:
    net = small_net(density=1.0)
    layer = net.layers["0"]
    assert layer.nnz == layer.numel == 8 * 3 * 9
    layer.mask[0] = False
    assert layer.nnz == 7 * 3 * 9
    net.set_masks({"0": torch.zeros_like(layer.mask)})
    assert layer.nnz == 0
    assert layer.density == 0.0
    assert int(outside(layer).count_nonzero()) == 0


@pytest.mark.parametrize("layer", ["conv", "linear", "attention"])
def test_a_collected_gradient_is_that_of_the_dense_layer_and_the_optimizer_sees_it_masked(layer: str) -> None:
    torch.manual_seed(0)
    make = {
        "conv": lambda: (nn.Conv2d(3, 4, 3), (torch.randn(2, 3, 6, 6),)),
        "linear": lambda: (nn.Linear(5, 4), (torch.randn(3, 5),)),
        "attention": lambda: (nn.MultiheadAttention(8, 2, batch_first=True), (torch.randn(2, 3, 8),) * 3),
    }
    plain, inputs = make[layer]()
    twin = to_twin(copy.deepcopy(plain))
    twin.mask.copy_(torch.rand(twin.mask.shape) < 0.4)
    with torch.no_grad():
        next(p for n, p in plain.named_parameters() if n == twin.weight_name).mul_(twin.mask)
    twin.collects_gradient = True
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch in (inputs, tuple(2 * x for x in inputs)):  # two backward passes: an accumulation window
        for module in (plain, twin):
            output = module(*batch)
            (output[0] if layer == "attention" else output).square().sum().backward()
    expected = next(p.grad for n, p in plain.named_parameters() if n == twin.weight_name)
    optimizer.step()
    assert twin.dense_gradient is not None
    torch.testing.assert_close(twin.dense_gradient, expected)
    assert twin.dense_gradient[~twin.mask].abs().max() > 0
    assert torch.equal(twin.parameter.grad[~twin.mask], torch.zeros(int((~twin.mask).sum())))
    assert not twin.parameter.detach()[~twin.mask].any()
