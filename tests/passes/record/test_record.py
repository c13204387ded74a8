"""Recording: whatever a forward does is in the graph, in order, with a free batch size."""

import dataclasses
import math
import random
import re
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from breadth import some
from places import GOLDEN
from torch import nn
from torch.nn import functional as F

import growfx
from growfx.passes.record.parts import are_apart
from growfx.passes.record.recording import DataDependentError, record


class Attention(nn.Module):
    """Functional weights, sizes, a table and an assert, as hand-written attention blocks have them."""

    def __init__(self, dim: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("table", torch.randn(heads, 5, 5))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        torch._assert(dim % self.heads == 0, "heads")
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        q, k, v = qkv.reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (dim // self.heads) ** -0.5) @ k.transpose(-2, -1) + self.table
        x = (self.drop(scores.softmax(dim=-1)) @ v).transpose(1, 2).reshape(batch, tokens, dim)
        return self.proj(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.conv2(x).add_(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("model", "shape"), [(Residual(), (2, 3, 6, 6)), (Attention(), (2, 5, 8))])
def test_the_recorded_graph_reads_as_the_golden_text(model: nn.Module, shape: tuple[int, ...]) -> None:
    net = growfx.wrap(model.eval(), torch.randn(shape))
    text = "\n".join(line.split(";")[0].rstrip() for line in net.code.strip().splitlines()) + "\n"
    file = GOLDEN / f"graph_{type(model).__name__.lower()}.txt"
    assert text == file.read_text()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_size_is_free(batch: int) -> None:
    model = Attention().eval()
    net = growfx.wrap(model, torch.randn(2, 5, 8))
    x = torch.randn(batch, 5, 8)
    assert torch.equal(net(x), model(x))
    assert len(net.recordings) == 2


def test_dropout_and_batch_norm_follow_the_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2))
    net = growfx.wrap(model, torch.randn(2, 3, 6, 6))
    x = torch.randn(4, 3, 6, 6)
    for mode in (True, False):
        net.train(mode), model.train(mode)
        outputs = []
        for module in (net, model):
            torch.manual_seed(3)
            outputs.append(module(x))
        torch.testing.assert_close(outputs[0], outputs[1])


def test_wrapping_changes_neither_buffers_nor_mode_nor_random_state() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    net = growfx.wrap(model, torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not model[1].training
    assert net.training
    assert not net.get_submodule("1").training


def test_containers_in_and_out_keep_their_kinds() -> None:
    @dataclasses.dataclass
    class Output:
        main: torch.Tensor
        rest: list[torch.Tensor]

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, pair: list[torch.Tensor], scale: float = 1.0) -> OrderedDict:
            first, second = pair
            out = Output(self.a(first) * scale, [self.b(second), first])
            return OrderedDict(out=out, sizes=(first.shape[0], first.ndim))

    model = Many()
    net = growfx.wrap(model, ([torch.randn(2, 4), torch.randn(2, 4)],))
    assert net.trace_report.faithful
    pair = [torch.randn(2, 4), torch.randn(2, 4)]
    out, expected = net(pair), model(pair)
    assert type(out) is OrderedDict
    assert torch.equal(out["out"].main, expected["out"].main)
    assert torch.equal(out["out"].rest[1], pair[0])
    assert out["sizes"] == (2, 2)
    assert torch.equal(net(pair, scale=2.0)["out"].main, model(pair, scale=2.0)["out"].main)


def test_another_input_size_is_recorded_anew_and_kept() -> None:
    model = Residual().eval()
    net = growfx.wrap(model, torch.randn(2, 3, 6, 6))
    x = torch.randn(3, 3, 9, 7)
    assert torch.equal(net(x), model(x))
    assert len(net.recordings) == 2  # a forward records nothing
    graph = net.graph_at(x)
    assert net.graph_at(torch.randn(5, 3, 9, 7)) is graph
    assert len(net.recordings) == 3


def test_a_branch_on_the_size_is_taken_anew_at_another_size() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.shape[-1] > 4 else -self.conv(x)

    model = Branch()
    net = growfx.wrap(model, torch.randn(1, 3, 8, 8))
    for size in (8, 3):
        x = torch.randn(2, 3, size, size)
        assert torch.equal(net(x), model(x))


def test_writing_into_a_part_of_a_tensor_is_recorded() -> None:
    class Write(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x) * 2
            y[:, 1:3] = x[:, :2]
            z = torch.zeros_like(y)
            z[:, 0] = y[:, 1]
            z[:, 2:].copy_(y[:, :2])
            return y + z

    model = Write()
    net = growfx.wrap(model, torch.randn(2, 4))
    assert net.trace_report.faithful
    x = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(net(x), model(x))
    (a,), (b,) = torch.autograd.grad(net(x).sum(), x), torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(a, b)


def test_no_grad_inside_a_forward_is_recorded_and_ends() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.a(x)
            return self.b(x)

    net = growfx.wrap(Frozen(), torch.randn(2, 4)).train()
    net(torch.randn(3, 4)).sum().backward()
    assert net.get_parameter("a.weight").grad is None
    assert net.get_parameter("b.weight").grad is not None
    with torch.no_grad():
        assert not net(torch.randn(3, 4)).requires_grad
    assert torch.is_grad_enabled()


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.yes(x) if x.sum() > 0 else self.no(x)


def test_a_module_that_branches_on_data_is_recorded_whole_and_named() -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), gate=Gate(), last=nn.Linear(4, 4)))
    net = growfx.wrap(model, torch.randn(2, 4), density=0.5)
    assert list(net.trace_report.opaque) == ["gate"]
    assert "in forward" in net.trace_report.opaque["gate"]
    assert net.trace_report.faithful
    assert set(net.layers) == {"first", "gate.yes", "gate.no", "last"}
    plain = growfx.unwrap(net)
    for _ in range(6):
        x = torch.randn(3, 4)
        torch.testing.assert_close(net(x), plain(x))


def test_a_model_that_branches_on_data_runs_its_own_forward_over_masked_layers() -> None:
    class Functional(Gate):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + F.linear(x, self.no.weight)

    net = growfx.wrap(Functional(), torch.randn(2, 4), density=0.5)
    assert not net.trace_report.faithful
    assert "" in net.trace_report.opaque
    assert "no pass works on it" in str(net.trace_report)
    plain = growfx.unwrap(net)
    net.train()
    for sign in (1, -1):
        x = sign * torch.rand(3, 4)
        torch.testing.assert_close(net(x), plain(x))
        net(x).sum().backward()
    for layer in net.layers.values():
        assert not layer.parameter.grad[~layer.mask].any()
    # The graph to work on is that of the branch taken.
    targets = {node.target for node in net.graph_at(torch.ones(2, 4)).nodes}
    assert "yes" in targets
    assert "no" not in targets


def test_a_graph_that_even_differs_on_its_own_inputs_is_refused() -> None:
    class Dices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * random.random()

    net = growfx.wrap(Dices(), torch.randn(2, 4))
    assert not net.trace_report.faithful
    with pytest.raises(growfx.TraceError, match="not faithful"):
        net.graph_at(torch.randn(2, 4))


def test_a_size_that_depends_on_data_may_be_used_but_not_branched_on() -> None:
    class Positive(nn.Module):
        def __init__(self, branches: bool) -> None:
            super().__init__()
            self.fc, self.branches = nn.Linear(4, 4), branches

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x[x[:, 0] > 0]
            if self.branches and rows.shape[0] > 1:
                rows = rows * 2
            return self.fc(rows).reshape(rows.shape[0] * 2, 2)

    x = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    free = growfx.wrap(Positive(branches=False), x)
    assert free.trace_report.faithful
    assert free(x).shape == (4, 2)
    assert free(-x).shape == (2, 2)
    stopped = growfx.wrap(Positive(branches=True), x)
    assert "branch on a size" in stopped.trace_report.opaque[""]


def test_a_write_into_a_part_becomes_functional() -> None:
    class Batches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
            batch = images[0].new_zeros(len(images), 6)
            for i, image in enumerate(images):
                batch[i][: image.shape[0]].copy_(image)
            batch[0, 1:3][0] += 5
            batch[:, 2:].view(len(images), 2, 2).mul_(3)
            return self.fc(batch)

    model = Batches()
    images = [torch.randn(4), torch.randn(5)]
    net = growfx.wrap(model, (images,))
    assert net.trace_report.faithful
    nodes = list(net.graph_at(images).nodes)
    assert not [n for n in nodes if str(n.target) in ("copy_", "mul_", "__iadd__") and not n.users]
    assert torch.equal(net([torch.ones(4), torch.ones(5)]), model([torch.ones(4), torch.ones(5)]))
    other = [torch.ones(2), torch.ones(6), torch.ones(3)]
    assert torch.equal(net(other), model(other))


MOVES = [
    lambda y: y.transpose(1, 2).transpose(0, 1),
    lambda y: y.transpose(-1, 0),
    lambda y: y.permute(2, 0, 1),
    lambda y: y.permute((1, -1, 0)),
    lambda y: torch.permute(y, (2, 1, 0)),
    lambda y: y.movedim(0, -1),
    lambda y: y.swapaxes(0, 2)[1:].transpose(0, 1),
    lambda y: y.narrow(2, 1, 3).permute(2, 0, 1),
    lambda y: y.select(-2, 2).t().unsqueeze(1),
]


@pytest.mark.parametrize("moved", some(MOVES, lambda moved: moved in MOVES[::3]))
def test_a_write_into_a_part_behind_moved_axes_becomes_functional(
    moved: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.last = nn.Linear(4, 12), nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x).view(len(x), 3, 4)
            moved(y)[0].mul_(3)
            moved(y)[1] += 2
            return self.last(y.flatten(1))

    torch.manual_seed(0)
    net = growfx.wrap(Writes(), torch.randn(2, 4)).eval()
    assert net.trace_report.faithful
    nodes = list(net.graph_at(torch.randn(2, 4)).nodes)
    assert not [n for n in nodes if str(n.target) in ("mul_", "__iadd__") and not n.users]
    x = torch.randn(2, 4)
    assert torch.equal(net.graph_module()(x), net(x))
    # An edge into what is tripled scores three times what it would.
    once = growfx.path_products(net, norm="identity")
    factor = torch.ones(2, 3, 4)
    moved(factor)[0].mul_(3)
    per_unit = factor[0].flatten().double() * net.get_parameter("last.weight").detach().abs().sum(0).double()
    scores = once.scores["fc"] * math.exp(once.log_scale)
    torch.testing.assert_close(scores, per_unit[:, None].expand(12, 4), rtol=1e-6, atol=1e-6)


def test_a_write_beside_another_part_that_lives_on_becomes_functional() -> None:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x).view(len(x), 4, 2)
            even, odd = y[:, :, 0], y[:, :, 1]
            size = even.size(1)
            odd.add_(even)
            even, odd = y[:, 2:], y[:, : size - 2]
            even.mul_(odd)
            return torch.cat([y.flatten(1), odd.flatten(1)], 1)

    net = growfx.wrap(Scan(), torch.randn(2, 4)).eval()
    assert net.trace_report.faithful
    nodes = list(net.graph_at(torch.randn(2, 4)).nodes)
    assert not [n for n in nodes if str(n.target) in ("mul_", "add_") and not n.users]
    x = torch.randn(3, 4)
    assert torch.equal(net.graph_module()(x), net(x))
    assert growfx.path_products(net).log_total > -math.inf


def test_parts_are_told_apart_by_the_elements_they_hold() -> None:
    base = torch.zeros(4, 6)
    views = {"even": base[:, ::2], "odd": base[:, 1::2], "left": base[:, :3], "right": base[:, 3:], "row": base[2]}
    views |= {"turned": base.t()[3:5], "spread": base[:1, :1].expand(4, 6), "nothing": base[:0], "wide": base[None, 1:]}
    for one in views.values():
        for other in views.values():
            marked = torch.zeros_like(base)
            marked.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(1)
            seen = marked.as_strided(other.shape, other.stride(), other.storage_offset())
            assert are_apart(one, other) == (not seen.any())


def test_a_write_that_other_tensors_see_stays_a_write() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            early = y[:, :2]
            y[:, 1].mul_(2)
            y[:, 0] = 7.0
            return torch.cat([early, y], 1)

    model = Writes()
    net = growfx.wrap(model, torch.randn(2, 4))
    assert net.trace_report.faithful
    x = torch.randn(3, 4)
    assert torch.equal(net(x), model(x))


def test_a_model_that_wants_targets_to_train_is_recorded_in_eval_mode_alone() -> None:
    class Detects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, images: list[torch.Tensor], targets: list[torch.Tensor] | None = None) -> torch.Tensor:
            out = self.fc(torch.stack(images))
            if not self.training:
                return out
            assert targets is not None, "targets, please"
            return (out - torch.stack(targets)).square().mean()

    images = [torch.randn(4), torch.randn(4)]
    net = growfx.wrap(Detects(), (images,), density=0.5)
    assert net.trace_report.faithful
    assert any("targets, please" in note for note in net.trace_report.notes)
    net.train()
    net(images, images).backward()
    layer = net.layers["fc"]
    assert layer.parameter.grad is not None
    assert not layer.parameter.grad[~layer.mask].any()
    with pytest.raises(AssertionError, match="targets, please"):
        net(images)


def test_ever_new_shapes_run_the_models_own_forward() -> None:
    model = nn.Conv1d(1, 2, 3)
    net = growfx.wrap(nn.Sequential(model), torch.randn(1, 1, 8), density=0.5).eval()
    plain = growfx.unwrap(net)
    for length in range(4, 44):
        x = torch.randn(1, 1, length)
        assert torch.equal(net(x), plain(x))
    assert len(net.recordings) == 2
    for length in range(4, 44):
        net.graph_at(torch.randn(1, 1, length))
    assert len(net.recordings) <= 32


class Hidden(nn.Module):
    """Computes where no recorder looks, and takes no more than two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 2:
            raise ValueError("two rows at most")
        with torch._C.DisableTorchFunction():
            y = x * 2
        return self.fc(y)


def test_a_model_that_refuses_another_batch_size_is_compared_at_its_own() -> None:
    model = Hidden()
    net = growfx.wrap(model, torch.randn(2, 4))
    assert not net.trace_report.faithful
    x = torch.randn(2, 4)
    assert torch.equal(net(x), model(x))


def test_record_alone_names_the_module_that_reads_data() -> None:
    with pytest.raises(DataDependentError) as caught:
        record(nn.Sequential(nn.Linear(4, 4), Gate()), (torch.randn(2, 4),))
    assert caught.value.module == "1"


def test_a_wrong_shape_is_a_trace_error_with_module_and_line() -> None:
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3)))
    with pytest.raises(growfx.TraceError, match=r"module `conv`.*expected input.*to have 3 channels.*example_inputs"):
        growfx.wrap(model, torch.randn(1, 5, 8, 8))
    net = growfx.wrap(model, torch.randn(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match="to have 3 channels"):  # the model's own error
        net(torch.randn(1, 5, 8, 8))
    with pytest.raises(growfx.TraceError, match="to have 3 channels"):
        net.graph_at(torch.randn(1, 5, 8, 8))


def test_sizes_computed_by_arithmetic_stay_free() -> None:
    import math

    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = x.size(0)
            half = math.ceil(n * 2 / 2)
            x = self.fc(x).repeat(2 * n // n, 1)
            return x.view(half, -1)[: abs(-n)] + torch.arange(x.numel() // (8 * 1)).view(-1, 1)

    model = Sizes()
    net = growfx.wrap(model, torch.randn(2, 4))
    assert net.trace_report.faithful
    for batch in (1, 7):
        x = torch.randn(batch, 4)
        assert torch.equal(net(x), model(x))


def test_tensors_from_outside_the_model_are_constants_of_the_graph() -> None:
    outside = torch.randn(4)

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.plain = nn.Linear(4, 4), torch.randn(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + outside * self.plain

    model = Constant()
    net = growfx.wrap(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    assert torch.equal(net(x), model(x))
    assert set(net.state_dict()) == {*model.state_dict(), "fc.mask"}
    assert set(growfx.unwrap(net).state_dict()) == set(model.state_dict())


def test_recording_runs_on_a_copy_without_values_and_leaves_the_model_alone() -> None:
    devices = []

    class Watches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            devices.append(x.device.type)
            self.calls += 1
            self.last = x
            return self.fc(x) + torch.arange(4, device=x.device)

    net = growfx.wrap(Watches().train(), torch.randn(2, 4))
    assert set(devices) == {"cpu"}  # the model's own, where shapes alone are computed too
    assert "last" not in vars(net.shell)
    assert float(net.calls) == 0
    assert torch.equal(net(torch.ones(3, 4)), net.shell(torch.ones(3, 4)))


def test_a_forward_that_reads_values_of_its_own_is_recorded_with_values() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("rate", torch.tensor(3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * self.rate.item()

    net = growfx.wrap(Scaled(), torch.randn(2, 4))
    assert net.trace_report.faithful
    assert not net.trace_report.opaque
    assert "3.0" in str(net)


class _Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.rnn = nn.LSTM(6, 6, batch_first=True)
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(self.fc(x) * self.scale, self.fc.weight)
        return self.rnn(x)[0] @ self.matrix.t()


def test_weights_without_a_mask_are_listed() -> None:
    report = growfx.wrap(_Weights(), torch.randn(2, 3, 6)).trace_report
    assert report.layers == ["fc"]
    assert set(report.unmasked) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "matrix"}
    assert "LSTM" in report.unmasked["rnn.weight_ih_l0"]
    assert "matmul" in report.unmasked["matrix"]


def test_a_module_named_opaque_is_one_operator() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    net = growfx.wrap(model, torch.randn(2, 4), opaque=["1"], density=0.5)
    assert net.trace_report.opaque == {"1": "named by `1`"}
    assert net.trace_report.faithful
    assert list(net.layers) == ["0", "1.0"]
    assert "self_1_0" not in net._code
    assert torch.equal(net(torch.ones(3, 4)), growfx.unwrap(net)(torch.ones(3, 4)))
    # What works on the graph looks inside all the same.
    assert "1.0" in {node.target for node in net.graph_at(torch.ones(2, 4)).nodes}
    with pytest.raises(growfx.ConfigError, match="no module is named like `2`"):
        growfx.wrap(model, torch.randn(2, 4), opaque=["2"])


def test_a_convolution_with_conditional_weights_is_a_masked_layer() -> None:
    cond_conv = pytest.importorskip("timm.layers.cond_conv2d").CondConv2d

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.route, self.conv = nn.Linear(4, 3), cond_conv(4, 6, 3, num_experts=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x, torch.sigmoid(self.route(x.mean((2, 3)))))

    net = growfx.wrap(Routed(), torch.randn(2, 4, 8, 8), density=0.3)
    assert list(net.layers) == ["route", "conv"]
    assert net.layers["conv"].mask.shape == (3, 4 * 6 * 9)
    plain, x = growfx.unwrap(net), torch.randn(3, 4, 8, 8)
    assert torch.equal(net(x), plain(x))
    net.train()(x).sum().backward()
    layer = net.layers["conv"]
    assert not layer.parameter.grad[~layer.mask].any()


def test_an_object_a_graph_cannot_hold_leaves_the_model_its_own_forward() -> None:
    class Cache:
        def __init__(self, states: torch.Tensor) -> None:
            self.states = states

    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Cache]:
            y = self.fc(x)
            return y, Cache(y)

    net = growfx.wrap(Caches(), torch.randn(2, 4))
    assert net.trace_report.faithful
    assert any("`Cache`" in note for note in net.trace_report.notes)
    y, cache = net(torch.ones(3, 4))
    assert torch.equal(cache.states, y)
    assert growfx.path_products(net).scores["fc"].min() > 0


def test_repeating_by_numbers_gives_no_size_that_depends_on_data() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x).repeat_interleave(2, 0)
            return y if y.shape[-1] == 4 else -y

    assert not growfx.wrap(Repeats(), torch.randn(2, 4)).trace_report.opaque


def test_adding_to_a_part_that_nobody_else_sees_is_recorded_as_it_is() -> None:
    class Cuts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)[:, :2]
            y += x[:, :2]
            return y

    net = growfx.wrap(Cuts(), torch.randn(2, 4))
    assert "clone" not in {node.target for node in net.graph_at(torch.randn(2, 4)).nodes}
    x = torch.randn(3, 4)
    assert torch.equal(net(x), growfx.unwrap(net)(x))


def test_a_module_that_packs_sequences_is_recorded_whole() -> None:
    """`PackedSequence` computes with the tensors it is given, so no graph holds one; what is around is followed."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(8, 6, batch_first=True)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.rnn(packed)[1][-1]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.encoder, self.head = nn.Embedding(9, 8), Encoder(), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(self.table(x), lengths))

    model = Net().eval()
    given = torch.randint(0, 9, (2, 5)), torch.tensor([3, 5])
    expected = model(*given)
    net = growfx.wrap(model, given)
    assert net.trace_report.faithful
    assert list(net.trace_report.opaque) == ["encoder"]
    assert "`encoder.rnn` takes a `PackedSequence`" in net.trace_report.opaque["encoder"]
    assert torch.equal(net(*given), expected)


def test_a_forward_may_hook_gradients_without_asking_whether_there_are_any():
    seen: list[torch.Tensor] = []

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.a(x)
            handle = y.register_hook(seen.append)
            z = self.b(y.relu())
            if len(x) == 1:
                handle.remove()
            return z

    net = growfx.wrap(Watching(), torch.randn(2, 4), density=0.5)
    seen.clear()
    for batch, hooks in ((3, 1), (1, 1)):
        net(torch.randn(batch, 4)).sum().backward()
        assert len(seen) == hooks
    assert set(net.layers) == {"a", "b"}


def test_a_hook_that_changes_a_gradient_is_reported_by_the_weight_whose_gradient_it_is():
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.a(x)
            y.register_hook(lambda gradient: 2 * gradient)
            return self.b(y.relu())

    report = growfx.wrap(Doubling(), torch.randn(2, 4)).trace_report
    assert not report.faithful
    assert re.search(r"the gradient of `a\.weight` differs by .* between the model and the graph", str(report))
    assert "output 0" not in str(report)
