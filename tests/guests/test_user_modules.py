"""Networks as researchers write them: what `growfx.wrap` makes of plain modules, and what it says where it cannot."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import growfx


def check(model: nn.Module, *arguments: Any, layers: set[str] | None = None) -> growfx.MaskedGraph:
    """Wrap the model: the net must compute what the model computes, in both modes, dense and sparse."""
    net = growfx.wrap(model, arguments)
    assert net.trace_report.faithful, net.trace_report.notes
    assert not net.trace_report.opaque
    if layers is not None:
        assert set(net.layers) == layers
    for training in (False, True):
        assert_equal_outputs(net.train(training), model.train(training), *arguments)
    sparse = growfx.wrap(copy.deepcopy(model), arguments, density=0.5).eval()
    assert_equal_outputs(sparse, growfx.unwrap(sparse), *arguments)
    assert not any(bool(layer.parameter[~layer.mask].any()) for layer in sparse.layers.values())
    return net


def assert_equal_outputs(net: nn.Module, model: nn.Module, *arguments: Any) -> None:
    torch.manual_seed(1)
    got = net(*arguments)
    torch.manual_seed(1)
    torch.testing.assert_close(got, model(*arguments), rtol=0, atol=0)


def assert_scored(net: growfx.MaskedGraph, off_path: set[str] | None = None) -> None:
    paths = growfx.path_products(net)
    assert math.isfinite(paths.log_total)
    assert set(paths.off_path) == (off_path or set())
    assert all(bool(torch.isfinite(s).all() & (s >= 0).all() & s.any()) for s in paths.scores.values())


# -- structure --------------------------------------------------------------------------------------------------------


class Columns(nn.Module):
    """A grid of blocks in nested lists, walked by Python loops, with a dict of heads."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.grid = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(3))
        self.heads = nn.ModuleDict({"a": nn.Linear(width, 2), "b": nn.Linear(width, 3)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for row in cast(Iterable[nn.ModuleList], self.grid):
            x = x + sum(F.gelu(block(x)) for block in row) / len(row)
        return {name: head(x) for name, head in self.heads.items()}


def test_nested_lists_and_dicts_of_modules_keep_their_names() -> None:
    names = {f"grid.{i}.{j}" for i in range(3) for j in range(2)} | {"heads.a", "heads.b"}
    assert_scored(check(Columns(), torch.randn(4, 6), layers=names))


class Unrolled(nn.Module):
    """One layer used again and again, and another one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first = nn.Linear(5, 5), nn.Linear(4, 5)
        self.again = self.inner
        self.last = nn.Linear(5, 4)
        self.last.weight = nn.Parameter(self.first.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return self.again(x) @ self.first.weight


def test_a_layer_used_several_times_has_one_mask_for_all_its_uses() -> None:
    net = check(Unrolled(), torch.randn(3, 4), layers={"first", "inner"})
    assert "last" in net.trace_report.unmasked
    mask = torch.zeros(5, 5, dtype=torch.bool)
    net.set_masks({"inner": mask})
    net.eval()
    assert torch.equal(net(torch.randn(1, 4)), net(torch.randn(1, 4)))  # nothing of the input is left
    assert_scored(growfx.wrap(Unrolled(), torch.randn(3, 4)))


class Tied(nn.Module):
    """Two layers of one weight, as autoencoders and language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.middle, self.decode = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(F.relu(self.middle(F.relu(self.encode(x)))))


def test_layers_that_share_a_weight_share_its_mask() -> None:
    net = check(Tied(), torch.randn(3, 6), layers={"encode", "middle"})
    assert net.trace_report.tied == {"decode": "encode"}
    mask = torch.rand(6, 6) < 0.5
    net.set_masks({"encode": mask})
    assert torch.equal(net.get_submodule("decode").mask, mask)
    plain = growfx.unwrap(net)
    assert plain.get_parameter("encode.weight") is plain.get_parameter("decode.weight")
    assert_scored(net)


class Functional(nn.Module):
    """Weights used by functions: of layers never called, transposed, and plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.conv = nn.Linear(6, 18), nn.Linear(6, 6), nn.Conv1d(6, 6, 3)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, dim=-1)
        x = F.scaled_dot_product_attention(q, k, v) * self.scale
        x = F.conv1d(x.transpose(1, 2), self.conv.weight, padding=1).transpose(1, 2)
        return x @ self.out.weight.t() + self.out.bias


def test_weights_used_by_functions_belong_to_their_layer_and_obey_its_mask() -> None:
    net = check(Functional(), torch.randn(2, 5, 6), layers={"qkv", "conv", "out"})
    assert_scored(net)
    x = torch.randn(2, 5, 6)
    before = net.eval()(x)
    for layer in net.layers.values():
        layer.mask.copy_(torch.rand(layer.mask.shape) < 0.5)
        after = net(x)
        assert not torch.equal(before, after)
        before = after
    assert torch.equal(growfx.unwrap(net)(x), before)


class Sliced(nn.Module):
    """One layer's weight in three parts, each used by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w, b) for w, b in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True))
        return self.out(F.scaled_dot_product_attention(q, k, v))


def test_parts_of_a_weight_score_as_the_whole() -> None:
    net = check(Sliced(), torch.randn(2, 5, 6), layers={"qkv", "out"})
    assert_scored(net)
    assert bool((growfx.path_products(net).scores["qkv"] > 0).all())


# -- arguments and results --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    logits: Tensor
    features: list[Tensor]
    note: str = "kept"


class Batch(nn.Module):
    """A dict of tensors in, a dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.table, self.head = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, batch: dict[str, Tensor], scale: float = 1.0) -> Output:
        image, table = self.image(batch["image"]).mean((2, 3)), self.table(batch["table"])
        return Output(self.head(F.relu(image + table)) * scale, [image, table])


def test_a_dict_of_inputs_and_a_dataclass_of_outputs() -> None:
    model = Batch()
    batch = {"image": torch.randn(2, 3, 6, 6), "table": torch.randn(2, 5)}
    net = growfx.wrap(model, (batch,))
    assert net.trace_report.faithful
    assert set(net.layers) == {"image", "table", "head"}
    for rows in (2, 4):
        batch = {"image": torch.randn(rows, 3, 6, 6), "table": torch.randn(rows, 5)}
        for options in ({}, {"scale": 3.0}):
            got, expected = net(batch, **options), model(batch, **options)
            assert isinstance(got, Output)
            assert got.note == "kept"
            assert torch.equal(got.logits, expected.logits)
            assert all(torch.equal(a, b) for a, b in zip(got.features, expected.features, strict=True))
    assert_scored(net)


class ByShape(nn.Module):
    """Python that looks at shapes, at optional arguments and at flags."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 5, padding=2), nn.Linear(4, 3)
        self.verbose = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        layer = self.far if min(height, width) >= 8 else self.near
        tokens = layer(x).flatten(2).transpose(1, 2).reshape(batch, height * width, -1)
        if mask is not None:
            tokens = tokens * mask.view(batch, -1, 1)
        assert not self.verbose
        return self.head(tokens.mean(1))


def test_branches_on_shapes_and_optional_arguments_follow_the_call() -> None:
    model = ByShape().eval()
    net = growfx.wrap(model, torch.randn(2, 2, 8, 8)).eval()
    assert net.trace_report.faithful
    for size in ((8, 8), (4, 6), (9, 8)):
        x, mask = torch.randn(3, 2, *size), torch.rand(3, *size)
        assert torch.equal(net(x), model(x))
        assert torch.equal(net(x, mask), model(x, mask))
        assert torch.equal(net(x, mask=mask), model(x, mask=mask))


def test_a_layer_the_example_never_reaches_is_listed_and_still_right() -> None:
    net = growfx.wrap(ByShape(), torch.randn(2, 2, 8, 8))
    assert "never called" in net.trace_report.unmasked["near"]
    assert "near" in str(net.trace_report)


# -- what torch offers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_of_torch_is_recorded_layer_by_layer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = check(model, torch.randn(3, 5, 8))
    kinds = (nn.Linear, nn.MultiheadAttention)
    assert set(net.layers) == {name for name, m in model.named_modules() if isinstance(m, kinds)}
    assert_scored(net)


class Text(nn.Module):
    """Embeddings, a recurrence, a linear head on the last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.rnn = kind(6, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.words(ids))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_recurrent_text_classifier(kind: type[nn.RNNBase]) -> None:
    model = Text(kind)
    net = growfx.wrap(model, torch.randint(0, 20, (2, 7)))
    assert net.trace_report.faithful
    for shape in ((3, 7), (2, 4)):
        ids = torch.randint(0, 20, shape)
        assert_equal_outputs(net.eval(), model.eval(), ids)
    assert "head" in net.layers
    recurrent = {f"rnn.{name}" for name, _ in model.rnn.named_parameters() if "weight" in name}
    assert recurrent <= net.trace_report.unmasked.keys()
    assert_scored(net)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 6, padding_idx=0), nn.Parameter(torch.randn(9, 6))
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places[: ids.shape[1]]
        kept = (ids != 0).unsqueeze(-1)
        x = (x * kept).sum(1) / kept.sum(1).clamp(min=1)
        return self.head(F.relu(self.hidden(x)))


def test_a_bag_of_words_is_scored_from_its_embeddings_on() -> None:
    net = check(Bag(), torch.randint(0, 20, (3, 6)), layers={"hidden", "head"})
    assert_scored(net)
    weight = net.get_parameter("head.weight").detach().abs().double()
    score = growfx.path_products(net)
    hidden = score.scores["hidden"] * math.exp(score.log_scale)
    # Every word unit is the source of one unit of path mass; what reaches `hidden` leaves through `head`.
    assert torch.allclose(hidden / hidden[:, :1], torch.ones_like(hidden))
    assert torch.allclose(hidden[:, 0] / hidden[0, 0], weight.sum(0) / weight.sum(0)[0])


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrized_layer_works_and_is_accounted_for(kind: str) -> None:
    inner = getattr(parametrizations, kind)(nn.Linear(5, 5))
    model = nn.Sequential(nn.Linear(4, 5), inner, nn.ReLU(), nn.Linear(5, 2)).eval()
    net = growfx.wrap(model, torch.randn(3, 4), density=0.5)
    assert net.trace_report.faithful
    assert {"0", "3"} <= set(net.layers)
    assert {"1"} <= {*net.layers, *net.trace_report.unmasked}
    x = torch.randn(6, 4)
    assert torch.allclose(net.eval()(x), growfx.unwrap(net)(x))
    net.train()(x).sum().backward()


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_paths_cross_a_parametrized_layer_by_the_weight_it_applies(kind: str) -> None:
    inner = getattr(parametrizations, kind)(nn.Linear(5, 5, bias=False))
    model = nn.Sequential(nn.Linear(4, 5), inner, nn.ReLU(), nn.Linear(5, 2)).eval()
    paths = growfx.path_products(growfx.wrap(model, torch.randn(3, 4)))
    first, middle, last = (m.weight.detach().double().abs() for m in (model[0], inner, model[3]))
    expected = (last @ middle).sum(0)[:, None].expand_as(first)
    got = paths.scores["0"] * math.exp(paths.log_scale)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


# -- what cannot be recorded ------------------------------------------------------------------------------------------


class Adaptive(nn.Module):
    """Repeats a layer until its output is small: how often depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            if x.norm() < 1:
                break
            x = torch.tanh(self.step(x)) / 2
        return x


def test_a_module_that_looks_at_data_is_kept_whole_masked_and_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Adaptive(), nn.Linear(6, 2))
    net = growfx.wrap(model, torch.randn(3, 4), density=0.5)
    assert net.trace_report.faithful
    assert set(net.layers) == {"0", "1.step", "2"}
    (reason,) = net.trace_report.opaque.values()
    assert list(net.trace_report.opaque) == ["1"]
    assert Path(__file__).name in reason
    assert "in forward" in reason
    plain = growfx.unwrap(net)
    for scale in (0.01, 1.0, 100.0):  # as many steps as the data ask for, not as many as were recorded
        x = scale * torch.randn(3, 4)
        assert torch.equal(net.eval()(x), plain.eval()(x))


def test_path_products_look_into_a_module_that_is_kept_whole() -> None:
    inside = nn.Sequential(nn.Linear(4, 6), Adaptive(), nn.Linear(6, 2))
    net = growfx.wrap(inside, torch.randn(3, 4))
    assert_scored(net)
    assert list(growfx.path_products(net).scores) == ["0", "1.step", "2"]


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 7)


def test_a_module_that_fails_is_named_with_its_line_and_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(Broken(), nn.Linear(7, 2)))
    with pytest.raises(growfx.TraceError) as caught:
        growfx.wrap(model, torch.randn(2, 4))
    message = str(caught.value)
    assert "module `1.0`" in message
    assert f"{Path(__file__).name}:" in message
    assert "(2, 4)" in message
    assert "example_inputs" in message
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("inputs", [None, torch.randn(2, 9), torch.randint(0, 9, (2, 4))])
def test_inputs_the_model_does_not_take_are_refused_by_name(inputs: Tensor | None) -> None:
    with pytest.raises(growfx.TraceError, match=r"module `0`.*example_inputs"):
        growfx.wrap(nn.Sequential(nn.Linear(4, 2)), inputs)


def test_a_net_wrapped_in_inference_mode_trains_and_one_whose_weights_were_made_there_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(2, 4)
    with torch.inference_mode():
        net = growfx.wrap(model, x, density=0.5).eval()
        assert torch.equal(net(x), growfx.unwrap(net)(x))
        foreign = nn.Sequential(nn.Linear(4, 2))
    net.train()(x).sum().backward()
    with pytest.raises(growfx.ConfigError, match=r"were made inside `torch\.inference_mode`.*outside"):
        growfx.wrap(foreign, x)


class Noisy(nn.Module):
    """Draws its own random numbers, also in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + torch.randn_like(x)) * torch.rand(1)


def test_random_numbers_are_drawn_anew_in_every_call() -> None:
    net = check(Noisy(), torch.randn(3, 4), layers={"fc"})
    x = torch.randn(3, 4)
    assert not torch.equal(net(x), net(x))


def test_a_model_without_layers_says_so_when_scored() -> None:
    net = growfx.wrap(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), torch.randn(3, 4))
    assert not net.layers
    with pytest.raises(growfx.TraceError, match="no masked layer"):
        growfx.path_products(net)


class _Rounded(torch.autograd.Function):
    """Rounds; its gradient is passed on times `slope`, as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.slope * grads[0], None


class _Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(_Rounded.apply(self.first(x), 0.5))


def test_the_gradient_of_an_autograd_function_is_its_authors() -> None:
    torch.manual_seed(0)
    model = _Quantized()
    net = growfx.wrap(model, torch.randn(2, 6))
    assert net.trace_report.faithful
    images = 3 * torch.randn(7, 6)
    gradients = []
    for module in (model, net):
        module.train()
        module.zero_grad()
        module(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert gradients[0][0].abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert "_Rounded(" in str(net.graph_at(images, training=True).python_code("self").src)
    assert growfx.path_products(net).off_path == {}
