"""Plans for the native runtime: what is folded and fused, and which results share memory."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from breadth import some
from native_nets import Classifier, Function
from torch import Tensor, nn

import growfx
from growfx.deploy.native.export import native_plan
from growfx.passes.lower.plan import missing_kernels, unknown_operators
from growfx.passes.lower.plan.file import network_bytes
from growfx.recorded.inputs import Inputs
from growfx.runtime.native.library import NativeNetwork
from growfx.runtime.native.plan import Plan, Size


def plan_of(model: nn.Module, *shape: int) -> Plan:
    return native_plan(model, (torch.randn(shape),))


def test_a_network_is_a_short_list_of_steps_with_norms_folded_and_chains_fused() -> None:
    plan = plan_of(Classifier(), 1, 3, 16, 16)
    assert [(step.kernel, [post.operation for post in step.post]) for step in plan.steps] == [
        ("convolution", ["hard_swish"]),
        ("convolution", ["silu"]),
        ("reduce", []),
        ("convolution", ["sigmoid"]),
        ("gated_convolution", ["add"]),
        ("reduce", []),
        ("linear", []),
    ]
    assert plan.folded == 4
    assert str(plan).splitlines()[0] == "v1[batch, 8, 8, 8] = convolution(v0, c0, c1) hard_swish"
    assert plan.values[plan.inputs[0]].shape == (Size(1, 0), Size(0, 3), Size(0, 16), Size(0, 16))


MODELS = ["resnet18", "densenet121", "mobilenetv3_small_050", "test_vit"]


@pytest.mark.parametrize("name", some(MODELS, lambda name: name in ("resnet18", "test_vit")))
def test_a_result_is_never_overwritten_while_it_is_needed(name: str) -> None:
    model = growfx.create_model(name).eval()
    side = 64 if name != "test_vit" else 160
    plan = plan_of(model, 1, 3, side, side)
    holds = {plan.values[i].slot: i for i in plan.inputs}
    known = len(plan.values)
    for step in plan.steps:
        read = [i for i in (*step.inputs, *(p.operand for p in step.post)) if i is not None and i < known]
        for i in read:
            # Values of one slot and size may be the same numbers in another shape.
            last = plan.values[holds[plan.values[i].slot]]
            assert elements(last.shape) == elements(plan.values[i].shape)
            assert plan.values[i].slot != plan.values[step.output].slot
        holds[plan.values[step.output].slot] = step.output
    for i in plan.outputs:
        assert elements(plan.values[holds[plan.values[i].slot]].shape) == elements(plan.values[i].shape)
    assert plan.slots < len(plan.steps) / 2
    assert plan.memory(4) <= 4 * plan.memory(1)


def elements(shape: tuple[Size, ...]) -> int:
    return torch.Size(size.at(7) for size in shape).numel()


def test_masked_weights_keep_their_masks_through_views_and_folded_norms() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
            return self.attention(x, x, x, need_weights=False)[0]

    net = growfx.wrap(Net(), torch.randn(1, 3, 6, 6), density=0.3).eval()
    plan = native_plan(net)
    stored = sum(int(constant.mask.sum()) for constant in plan.constants if constant.mask is not None)
    assert stored == net.nnz


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1)])
def test_a_linear_layer_on_an_input_that_is_not_contiguous_stores_its_weight_once(order: tuple[int, ...]) -> None:
    """Torch expands the weight by the first axis, which may be the batch, and multiplies batches of matrices."""
    layer = nn.Linear(6, 4)
    net = growfx.wrap(Permuted(layer, order), torch.randn(1, 6, 6), density=0.5).eval()
    plan = native_plan(net)
    assert [tuple(c.tensor.shape) for c in plan.constants if c.mask is not None] == [(4, 6)]
    assert "product" not in {step.kernel for step in plan.steps}
    x = torch.randn(5, 6, 6)
    with torch.no_grad():
        assert torch.allclose(NativeNetwork(network_bytes(plan))(x)[0], net(x), atol=1e-6)


class Permuted(nn.Module):
    def __init__(self, layer: nn.Module, order: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.order = layer, order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.permute(*self.order))


def test_tables_that_are_larger_than_what_they_are_made_of_are_made_when_the_network_is_opened() -> None:
    index = torch.arange(40)[:, None] - torch.arange(40) + 39
    model = Function(lambda x, table: x + table[index.flatten()].view(40, 40, 8).permute(2, 0, 1), torch.randn(79, 8))
    plan = plan_of(model, 1, 8, 40, 40)
    assert sum(constant.tensor.numel() for constant in plan.constants) == 79 * 8
    assert plan.steps[0].kernel == "gather"


def test_a_gate_that_more_is_read_of_or_that_is_none_stays_a_step_of_its_own() -> None:
    def gated(x: torch.Tensor, weight: torch.Tensor, kind: str) -> torch.Tensor:
        gate = x.mean((2, 3), keepdim=True).sigmoid() if kind != "places" else x.mean(1, keepdim=True).sigmoid()
        y = x * gate
        stride = 2 if kind == "stride" else 1
        return F.conv2d(y, weight, stride=stride) + (y if kind == "twice" else 0)

    deep = Function(lambda x, w: F.conv3d(x * x.mean((2, 3, 4), keepdim=True), w), torch.randn(4, 4, 1, 1, 1))
    assert "gated_convolution" not in {step.kernel for step in plan_of(deep, 1, 4, 2, 3, 3).steps}
    for kind in ("places", "stride", "twice"):
        model = Function(lambda x, weight, kind=kind: gated(x, weight, kind), torch.randn(4, 4, 1, 1))
        assert "gated_convolution" not in {step.kernel for step in plan_of(model, 1, 4, 6, 6).steps}, kind


@pytest.mark.parametrize("shape", [(3, 150, 150), (1, 3, 150, 150), (150 * 150, 3)])
def test_a_constant_that_repeats_itself_is_stored_as_a_table(shape: tuple[int, ...]) -> None:
    """A model may have computed it before it was recorded: nobody says then what it was made of."""
    generator = torch.Generator().manual_seed(0)
    table, places = torch.randn(3, 50, generator=generator), torch.randint(50, (150 * 150,), generator=generator)
    table[0, 3], table[1, 4] = torch.inf, -0.0
    bias = table[:, places].T.contiguous() if shape[-1] == 3 else table[:, places].reshape(shape)
    model = Function(lambda x: x[(..., *[None] * (len(shape) - 1))] * 0.5 + bias)
    plan = native_plan(model, (torch.randn(1, 1),))
    data = network_bytes(plan)
    assert len(data) < 0.75 * 4 * bias.numel()
    x = torch.randn(2, 1)
    assert torch.equal(NativeNetwork(data)(x)[0], model(x))


def _wrapping_around() -> Tensor:
    column, row = torch.arange(400, dtype=torch.uint8)[:, None], torch.arange(40, dtype=torch.uint8)
    return (column * row).float()


def _beyond_floats() -> Tensor:
    return (torch.arange(400)[:, None] * 16777217 + torch.arange(40) == 3 * 16777217).float()


@pytest.mark.parametrize("table", [_wrapping_around, _beyond_floats], ids=lambda f: f.__name__)
def test_constants_that_kernels_cannot_compute_are_stored(table: Callable[[], Tensor]) -> None:
    model, x = Function(lambda x: x[:, None] * table()), torch.randn(2, 40)
    assert torch.allclose(NativeNetwork(network_bytes(native_plan(model, (x,))))(x)[0], model(x))


def test_a_constant_without_a_kernel_is_stored_beside_the_one_it_is_computed_from() -> None:
    def divided(x: Tensor) -> Tensor:
        table = torch.linspace(1, 2, 40).expand(400, 40).contiguous()
        return x[:, None] * (torch.tensor(2.0) / table) + x[:, None] * table

    x = torch.randn(2, 40)
    assert torch.allclose(NativeNetwork(network_bytes(native_plan(Function(divided), (x,))))(x)[0], divided(x))


def test_a_tensor_that_is_returned_and_that_nothing_reads_is_an_output() -> None:
    anchors, x = torch.randn(3, 2), torch.randn(2, 4)
    found = NativeNetwork(network_bytes(native_plan(Function(lambda x: (x * 2, anchors)), (x,))))(x)
    assert all(map(torch.equal, found, (x * 2, anchors)))


def test_weights_that_repeat_themselves_stay_weights() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 512))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    assert [step.kernel for step in plan_of(model, 1, 64, 3, 3).steps] == ["convolution", "linear"]


def test_missing_kernels_are_counted_and_what_follows_them_is_not_blamed() -> None:
    model = Function(lambda x: F.relu(torch.cumprod(x, 1)) + torch.cumprod(x * 2, 1))
    assert missing_kernels(model, Inputs((torch.randn(1, 4),), {})) == {"aten.cumprod": 2}


def test_operators_that_no_rule_knows_are_found_without_computing_anything() -> None:
    model = Function(lambda x, w: F.relu(torch.cumprod(x, 1)) + torch.cumprod(w, 0), torch.randn(4)).to("meta")
    assert unknown_operators(model, Inputs((torch.empty(1, 4, device="meta"),), {})) == {"aten.cumprod": 1}


@pytest.mark.parametrize("pool", [nn.MaxPool1d(2), nn.AdaptiveMaxPool1d(3)])
def test_results_that_nobody_uses_need_no_kernel(pool: nn.Module) -> None:
    model, x = nn.Sequential(nn.Conv1d(3, 4, 1), pool).eval(), torch.randn(3, 3, 8)
    (found,) = NativeNetwork(network_bytes(native_plan(model, (x,))))(x)
    torch.testing.assert_close(found, model(x))


def test_results_beside_the_first_that_are_outputs_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2, return_indices=True)).eval()
    with pytest.raises(growfx.UnsupportedOperatorError, match="max_pool2d_with_indices"):
        plan_of(model, 1, 3, 8, 8)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[::2],
        lambda x: x[: x.shape[0] // 2],
        lambda x: x - x[: x.shape[0] // 2].sum(0),
        lambda x: x.squeeze(),
        lambda x: x * (x.shape[0] // 2),
        lambda x: x.roll(x.shape[0] // 2, 1),
        lambda x: x * torch.tensor(float(x.shape[0] // 2)),
    ],
)
def test_shapes_that_follow_the_batch_in_no_simple_way_are_refused(function) -> None:
    with pytest.raises(growfx.TraceError, match="batch"):
        plan_of(nn.Sequential(nn.Linear(4, 3), Function(function)).eval(), 2, 4)


def test_inputs_of_another_type_are_refused_by_its_name() -> None:
    net = NativeNetwork(network_bytes(plan_of(nn.Linear(4, 3), 2, 4)))
    with pytest.raises(growfx.ConfigError, match="float64"):
        net(torch.randn(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_a_network_that_stays_in_the_process_computes_the_same_bits(density: float) -> None:
    net = growfx.wrap(Classifier(), torch.randn(1, 3, 16, 16), density=density).eval()
    plan, x = native_plan(net), torch.randn(3, 3, 16, 16)
    small, quick = network_bytes(plan), network_bytes(plan, compressed=False)
    assert len(small) <= len(quick)
    assert torch.equal(NativeNetwork(small)(x)[0], NativeNetwork(quick)(x)[0])
