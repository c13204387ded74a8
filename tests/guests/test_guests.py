"""Models as other packages write them: whatever a forward does, the net does it, and the graph is right or refused."""

# pyright: reportIncompatibleMethodOverride=false
import collections
import copy
import dataclasses
import functools
import random
import threading
import warnings
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from breadth import some
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import growfx
from growfx.recorded.inputs import Inputs


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


# -- arguments --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    x: torch.Tensor


class Plain:
    def __init__(self, x):
        self.x = x


class Pair(NamedTuple):
    x: torch.Tensor


class ReadsObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, batch):
        return self.fc(batch.x)


@pytest.mark.parametrize("kind", [Batch, Plain, Pair])
def test_tensors_inside_objects_are_inputs(kind):
    model = ReadsObject().eval()
    net = growfx.wrap(model, (kind(torch.randn(3, 4)),), density=0.5).eval()
    plain = growfx.unwrap(net)
    assert net.trace_report.faithful
    buffers = len(list(net.buffers()))
    for _ in range(5):
        batch = kind(torch.randn(3, 4))
        assert torch.equal(net(batch), plain(batch))
        net.graph_at(batch)
    assert len(list(net.buffers())) == buffers
    assert set(growfx.path_products(net, example_inputs=(kind(torch.randn(3, 4)),)).scores) == {"fc"}


class Branches(nn.Module):
    """Branches on an argument of any kind."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x, how=None):
        y = self.fc(x)
        if isinstance(how, np.ndarray):
            return y * float(how.sum())
        if isinstance(how, set):
            return y * len(how)
        if isinstance(how, float):
            return y / how
        return y if how is None else y * int(how)


@pytest.mark.parametrize("values", [(2, 2.0), (True, 1), (np.ones(2), np.ones(3)), ({1}, {1, 2}), (None, 0)])
def test_equal_or_mutated_arguments_are_told_apart(values):
    model = Branches().eval()
    net = growfx.wrap(model, (torch.randn(2, 4), values[0])).eval()
    x = torch.randn(3, 4)
    for value in (*values, *values):
        assert torch.equal(net(x, value), model(x, value))
        program = net.recording(Inputs((x, value), {}), training=False)
        torch.testing.assert_close(program.run(net.shell, x, value), model(x, value))


class FillsCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, cache=None):
        y = self.fc(x)
        if cache is not None:
            cache.append(y)
            y = torch.stack(list(cache)).sum(0)
        return y


def test_a_cache_of_the_caller_is_filled_once_a_call_and_not_by_recordings():
    model = FillsCache().eval()
    first: list[torch.Tensor] = []
    net = growfx.wrap(model, (torch.randn(2, 4), first)).eval()
    assert first == []
    assert "writes into its arguments" in net.trace_report.side_effects
    ours: list[torch.Tensor] = []
    theirs: list[torch.Tensor] = []
    for _ in range(3):
        x = torch.randn(2, 4)
        assert torch.equal(net(x, ours), model(x, theirs))
    assert len(ours) == 3
    with pytest.raises(growfx.TraceError, match="writes into its arguments"):
        net.graph_module()


class KeywordOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, *, x, scale=1.0):
        return self.fc(x) * scale


@pytest.mark.parametrize("example", [{"x": torch.randn(2, 4)}, ((), {"x": torch.randn(2, 4), "scale": 2.0})])
def test_keyword_arguments_are_example_inputs(example):
    model = KeywordOnly().eval()
    net = growfx.wrap(model, example, density=0.5).eval()
    assert net.trace_report.faithful
    x = torch.randn(5, 4)
    assert torch.equal(net(x=x), growfx.unwrap(net)(x=x))
    assert set(growfx.path_products(net).scores) == {"fc"}


class FoldedClips(nn.Module):
    """The first dimension holds clips of four frames."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        y = self.fc(x).relu()
        return self.head(y.view(-1, 4, 8).roll(1, 1).mean(1))


class Adjacent(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("adjacency", torch.rand(5, 5))
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        return self.adjacency @ self.fc(x)


@pytest.mark.parametrize(("model", "shape"), [(FoldedClips(), (8, 6)), (Adjacent(), (5, 6)), (nn.Linear(6, 2), (6,))])
def test_inputs_whose_first_dimension_is_not_a_batch_are_recorded_as_given(model, shape):
    net = growfx.wrap(nn.Sequential(model).eval(), torch.randn(shape))
    assert net.trace_report.faithful
    x = torch.randn(shape)
    assert torch.equal(net(x), model(x))
    assert growfx.path_products(net, example_inputs=x).scores


# -- gradients and randomness -----------------------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Apart(torch.autograd.Function):
    """With a context of its own."""

    @staticmethod
    def forward(x, scale):
        return x.sign() * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return g * ctx.scale, None


class Inherits(Straight):
    pass


straight, apart, inherits = Straight.apply, Apart.apply, Inherits.apply


@pytest.mark.parametrize(
    "function", [straight, lambda x: apart(x, 3.0), inherits, Straight.apply, lambda x: Apart.apply(x, 3.0)]
)
def test_the_gradient_an_author_wrote_is_kept(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(function(self.a(x)))

    model = Net()
    reference = copy.deepcopy(model)
    net = growfx.wrap(model, torch.randn(2, 4)).train()
    assert net.trace_report.faithful
    x = torch.randn(5, 4) * 3
    net(x).sum().backward()
    reference(x).sum().backward()
    assert gap(net.get_parameter("a.weight").grad, reference.a.weight.grad) == 0
    program = net.graph_module(training=True)
    net.zero_grad()
    program(x).sum().backward()
    assert gap(net.get_parameter("a.weight").grad, reference.a.weight.grad) == 0


DRAWS = {
    "torch": lambda: float(torch.rand([])),
    "uniform_": lambda: float(torch.empty(1).uniform_()),
    "bernoulli": lambda: 1.0 - float(torch.bernoulli(torch.tensor(0.3))),
    "python": random.random,
    "numpy": lambda: float(np.random.rand()),  # noqa: NPY002
}


class Drops(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.layers_, self.draw = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), draw

    def forward(self, x):
        for layer in self.layers_:
            if self.training and self.draw() < 0.3:
                continue
            x = x + layer(x)
        return x


@pytest.mark.parametrize("draw", some(DRAWS, lambda one: one in list(DRAWS)[::3]))
def test_branches_on_random_numbers_are_taken_anew_in_every_call(draw):
    for seed in range(3):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002
        state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        net = growfx.wrap(
            nn.Sequential(Drops(DRAWS[draw]), nn.Linear(4, 2)), torch.randn(2, 4, generator=torch.Generator())
        ).train()
        assert random.getstate() == state[1]
        assert np.random.get_state()[1].tolist() == state[2]  # noqa: NPY002
        x, seen = torch.randn(2, 4), set()
        for number in range(40):
            torch.manual_seed(number), random.seed(number), np.random.seed(number)  # noqa: NPY002
            seen.add(round(float(net(x).sum().detach()), 4))
        assert len(seen) > 1
        with pytest.raises(growfx.TraceError):
            net.graph_module(training=True)
        assert growfx.path_products(net).scores


# -- what a forward does besides returning a value --------------------------------------------------------------------


class Moving(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        y = self.fc(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y - self.mean


class Leaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.v = nn.Linear(4, 4), 0.0

    def forward(self, x):
        self.v = 0.5 * self.v + self.fc(x)
        return self.v


class KeepsLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.losses = nn.Linear(4, 4), []

    def forward(self, x):
        y = self.fc(x)
        self.losses.append(y.square().mean())
        return y.relu()


@pytest.mark.parametrize("kind", [Moving, Leaky, KeepsLoss])
@pytest.mark.parametrize("training", [True, False])
def test_state_moves_once_a_call_and_not_by_recordings(kind, training):
    torch.manual_seed(0)
    model = kind()
    reference = copy.deepcopy(model).train(training)
    net = growfx.wrap(model, torch.randn(2, 4)).train(training)
    for name, value in vars(reference).items():
        if not name.startswith("_"):
            assert getattr(net.shell, name) == value
    for _ in range(3):
        x = torch.randn(5, 4)
        assert gap(net(x), reference(x)) < 1e-6
        net.graph_at(torch.randn(3, 4), training=training)
    for name, value in reference.named_buffers():
        assert gap(net.get_buffer(name), value) < 1e-6
    assert len(net.shell.losses if kind is KeepsLoss else []) == (3 if kind is KeepsLoss else 0)
    if training or kind is not Moving:
        assert net.trace_report.side_effects
        with pytest.raises(growfx.TraceError, match="assigns"):
            net.graph_module()


def blocks() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2))


@pytest.mark.parametrize("before", [True, False])
def test_hooks_fire_as_on_the_model_and_not_by_recordings(before):
    seen: list[str] = []
    model = blocks()
    target = model if before else growfx.wrap(model, torch.randn(2, 4))
    handles = [target.get_submodule(n).register_forward_hook(lambda *_, n=n: seen.append(n)) for n in ("0", "1", "1.0")]
    net = growfx.wrap(model, torch.randn(2, 4)) if before else target
    assert seen == []
    net(torch.randn(2, 4))
    assert seen == ["0", "1.0", "1"]
    net.graph_at(torch.randn(2, 1, 4))
    assert seen == ["0", "1.0", "1"]
    if not before:
        for handle in handles:
            handle.remove()
        net(torch.randn(2, 4))
        assert seen == ["0", "1.0", "1"]


def test_a_hook_that_changes_the_output_is_part_of_the_graph():
    model = blocks().eval()
    model[1].register_forward_hook(lambda module, args, output: output.mul(2))
    net = growfx.wrap(model, torch.randn(2, 4))
    assert net.trace_report.faithful
    x = torch.randn(3, 4)
    assert torch.equal(net.graph_module()(x), model(x))


def test_attributes_set_on_the_net_are_the_models():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(4, 2), 1.0

        def forward(self, x):
            return self.fc(x) * self.scale

    net = growfx.wrap(Scaled(), torch.randn(2, 4)).eval()
    x = torch.randn(3, 4)
    once = net(x)
    net.scale = 5
    assert net.shell.scale == 5
    assert torch.equal(net(x), once * 5)
    net.shell.scale = 2
    assert net.scale == 2
    assert torch.equal(net(x), once * 2)
    net.extra = nn.Parameter(torch.ones(1))
    assert "extra" in dict(net.shell.named_parameters())
    del net.extra
    assert "extra" not in dict(net.named_parameters())


class Merges(nn.Linear):
    """Adds a product of two small matrices to its weight in eval mode, as LoRA does."""

    def __init__(self):
        super().__init__(4, 4)
        self.a, self.b, self.merged = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2)), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a)
            self.merged = not mode
        return self

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("training", [True, False])
def test_an_artifact_has_the_weights_of_eval_mode_where_the_mode_changes_them(training, tmp_path):
    net = growfx.wrap(nn.Sequential(Merges(), nn.ReLU(), nn.Linear(4, 2)), torch.randn(1, 4)).train(training)
    x, state = torch.randn(3, 4), {name: value.clone() for name, value in net.state_dict().items()}
    growfx.save(net, tmp_path / "out")
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net.training == training
    loaded = growfx.load(tmp_path / "out", model=nn.Sequential(Merges(), nn.ReLU(), nn.Linear(4, 2)))
    assert not loaded.training
    assert gap(loaded(x), net.eval()(x)) == 0
    assert gap(loaded.train()(x), net.train()(x)) < 1e-5


def test_train_and_eval_of_the_model_are_not_called_by_recordings():
    for training in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Merges(), nn.ReLU(), nn.Linear(4, 2)).train(training)
        x = torch.randn(3, 4)
        expected, weights = model(x).detach(), [p.clone() for p in model.parameters()]
        net = growfx.wrap(model, torch.randn(1, 4))
        assert gap(model(x), expected) == 0
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
        assert gap(net(x), expected) < 1e-5
        assert gap(net.train(not training)(x), expected) < 1e-5


class Reset(nn.Module):
    """Keeps a state between calls; the class knows all its instances, and resets them together."""

    instances: ClassVar[list] = []

    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(1), persistent=False)
        self.instances.append(self)

    def forward(self, x):
        self.state = x + 0.5 * self.state
        return self.state

    @classmethod
    def reset(cls):
        for instance in cls.instances:
            instance.state = torch.zeros(1)


class Unrolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), Reset(), nn.Linear(6, 2), Reset())

    def forward(self, x):
        Reset.reset()
        return torch.stack([self.net(x) for _ in range(3)])


def test_a_class_that_resets_all_its_instances_knows_those_of_the_net():
    Reset.instances.clear()
    torch.manual_seed(0)
    model = Unrolled().eval()
    model.net[1].state = torch.full((3, 6), 7.0)
    before, state, x = list(Reset.instances), model.net[1].state, torch.randn(3, 4)
    net = growfx.wrap(model, torch.randn(2, 4)).eval()
    assert net.trace_report.faithful
    assert Reset.instances == [*before, net.shell.net[1], net.shell.net[3]]
    assert model.net[1].state is state
    plain = growfx.unwrap(net)
    for _ in range(2):
        assert torch.equal(net(x), model(x))
        assert torch.equal(plain(x), model(x))
    assert torch.equal(fx.GraphModule(net.shell, net.graph_at(x))(x), model(x))


def test_a_class_keeps_the_instances_it_knew_where_wrap_fails():
    Reset.instances.clear()
    model = Unrolled()
    before = list(Reset.instances)
    with pytest.raises(growfx.TraceError):
        growfx.wrap(model, torch.randn(2, 5))
    assert Reset.instances == before


def test_a_state_inside_a_graph_that_a_buffer_holds_is_copied_without_it():
    model = nn.Sequential(nn.Linear(4, 4), Reset(), nn.Linear(4, 2)).eval()
    net = growfx.wrap(model, torch.randn(2, 4)).eval()
    net(torch.randn(2, 4))
    assert net[1].state.grad_fn is not None
    assert growfx.path_products(net, example_inputs=torch.randn(2, 4)).log_total > -torch.inf
    assert growfx.unwrap(net)[1].state.grad_fn is None


def test_a_module_recorded_whole_that_writes_into_a_dict_it_is_given_leaves_its_caller_whole():
    class Fills(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, found):
            found["best"] = self.fc(x)[: int((x.sum() * 10).abs()) % 3 + 1]

    class Collects(nn.Module):
        def __init__(self):
            super().__init__()
            self.fills, self.fc = Fills(), nn.Linear(4, 2)

        def forward(self, x):
            found = {}
            self.fills(x, found)
            return self.fc(found["best"])

    model = Collects().eval()
    net = growfx.wrap(model, torch.randn(3, 4)).eval()
    assert "`fills` writes into" in net.trace_report.opaque[""]
    assert not net.trace_report.faithful
    for _ in range(3):
        x = torch.randn(3, 4)
        assert torch.equal(net(x), model(x))
        assert torch.equal(fx.GraphModule(net.shell, net.graph_at(x))(x), model(x))


# -- names of a twin that a layer has itself --------------------------------------------------------------------------


class OwnNames(nn.Linear):
    """Has what a masked twin would add."""

    def __init__(self, name):
        super().__init__(8, 8)
        self.name = name
        if name == "mask":
            self.register_buffer("mask", (torch.rand(8, 8) < 0.5).float())
        elif name == "gate":
            self.gate = nn.Linear(8, 8)
        else:
            setattr(self, name, 0.5)

    def forward(self, x):
        if self.name == "mask":
            return F.linear(x, torch.mul(self.weight, self.mask), self.bias)
        if self.name == "gate":
            return torch.mul(F.linear(x, self.weight, self.bias), torch.sigmoid(self.gate(x)))
        return F.linear(x, self.weight, self.bias) * getattr(self, self.name)


@pytest.mark.parametrize("name", ["mask", "gate", "numel", "density", "nnz", "settle", "sharded"])
def test_a_layer_keeps_its_own_names(name):
    torch.manual_seed(0)
    model = nn.Sequential(OwnNames(name), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(3, 8)
    expected, keys = model(x), set(model.state_dict())
    net = growfx.wrap(model, torch.randn(1, 8)).eval()
    assert net.trace_report.faithful
    assert torch.equal(net(x), expected)
    assert torch.equal(model(x), expected)
    assert keys < set(net.state_dict())
    assert set(net.masks) >= {"0", "2"}
    assert net.masks["0"].dtype == torch.bool
    net.set_masks({"0": torch.rand(8, 8) < 0.5})
    plain = growfx.unwrap(net)
    assert set(plain.state_dict()) == keys
    assert torch.equal(net(x), plain(x))
    assert not plain[0].weight[~net.masks["0"]].any()
    other = growfx.wrap(copy.deepcopy(model), torch.randn(1, 8)).eval()
    other.load_state_dict(net.state_dict())
    assert other.mask_digest() == net.mask_digest()
    assert torch.equal(other(x), net(x))


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round, as GPT-2 has it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) * 0.3), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def test_named_parameters_are_masked():
    model = nn.Sequential(
        collections.OrderedDict(fc=nn.Linear(4, 8), act=nn.ReLU(), c_attn=Conv1D(8, 6), out=nn.Linear(6, 3))
    )
    report = growfx.wrap(model, torch.randn(2, 4)).trace_report
    assert "c_attn.weight" in report.unmasked
    net = growfx.wrap(model, torch.randn(2, 4), masked=["c_attn.w*"], density=0.4)
    assert list(net.layers) == ["fc", "c_attn.weight", "out"]
    assert "c_attn.weight" not in net.trace_report.unmasked
    assert "c_attn.weight_mask" in net.state_dict()
    x = torch.randn(5, 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    layer = net.layers["c_attn.weight"]
    assert not layer.parameter[~layer.mask].any()
    plain = growfx.unwrap(net)
    assert set(plain.state_dict()) == set(model.state_dict())
    assert torch.equal(net(x), plain(x))
    assert copy.deepcopy(net).layers["c_attn.weight"].parameter is not layer.parameter
    with pytest.raises(growfx.ConfigError, match=r"`fc\.weight` has a mask already"):
        growfx.wrap(model, torch.randn(2, 4), masked=["fc.weight"])
    with pytest.raises(growfx.ConfigError, match="no parameter is named like it"):
        growfx.wrap(model, torch.randn(2, 4), masked=["nothing.*"])


# -- weights that are listed ------------------------------------------------------------------------------------------


class Bare(nn.Module):
    def __init__(self, use, shape=(8, 6)):
        super().__init__()
        self.first, self.weight, self.use = nn.Linear(8, 8), nn.Parameter(torch.randn(*shape)), use

    def forward(self, x):
        return self.use(self.first(x), self.weight)


CHANGES = {
    "scaled": lambda x, w: x @ (w * 0.5),
    "chunk": lambda x, w: x @ w.chunk(2, 1)[0],
    "split": lambda x, w: x @ w.split(3, 1)[0],
    "clone": lambda x, w: x @ w.clone(),
    "cast": lambda x, w: (x.bfloat16() @ w.bfloat16()).float(),
    "normalize": lambda x, w: x @ F.normalize(w),
    "swapaxes": lambda x, w: x @ w.swapaxes(0, 1).swapaxes(0, 1),
    "index_select": lambda x, w: x @ w.index_select(0, torch.arange(8)),
    "cat": lambda x, w: x @ torch.cat([w, w], 1),
    "round": lambda x, w: x @ w.round(),
    "inner": lambda x, w: torch.inner(x, w.T),
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x, w]),
    "softmax": lambda x, w: x @ w.softmax(0),
    "table": lambda x, w: x[:, :6] + w[: x.shape[0]],
    "detached": lambda x, w: x @ w.detach(),
    "checkpoint": lambda x, w: torch.utils.checkpoint.checkpoint(torch.matmul, x, w, use_reentrant=False),
}


@pytest.mark.parametrize("change", some(CHANGES, lambda one: one in list(CHANGES)[::3]))
def test_a_parameter_that_is_read_like_a_matrix_is_listed_however_it_is_changed(change):
    net = growfx.wrap(Bare(CHANGES[change]), torch.randn(4, 8))
    assert "weight" in net.trace_report.unmasked


def test_vectors_embeddings_and_norms_are_not_listed():
    class Quiet(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc, self.norm = nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm((3, 4))
            self.gain = nn.Parameter(torch.ones(1, 1, 4))

        def forward(self, ids):
            return self.norm(self.fc(self.table(ids)) * self.gain)

    assert growfx.wrap(Quiet(), torch.randint(0, 9, (2, 3))).trace_report.unmasked == {}


def test_an_embedding_that_is_used_as_queries_is_listed():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.fc = nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.queries.weight @ self.fc(x).mT

    assert "queries.weight" in growfx.wrap(Queries(), torch.randn(2, 3, 4)).trace_report.unmasked


def test_a_bare_weight_inside_a_module_recorded_whole_is_listed():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return x @ self.weight if float(x.sum()) < 1e9 else x

    net = growfx.wrap(nn.Sequential(nn.Linear(8, 8), Part(), nn.Linear(8, 2)), torch.randn(4, 8))
    assert "1.weight" in net.trace_report.unmasked


# -- tied weights -----------------------------------------------------------------------------------------------------


class Lm(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.mid(self.emb(ids)).relu())


@pytest.mark.parametrize("training", [True, False])
def test_a_tied_embedding_has_the_mask_and_its_gradient(training):
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (2, 5))
    net = growfx.wrap(Lm(), ids).train(training)
    net(ids).square().sum().backward()
    plain = growfx.unwrap(net)
    plain(ids).square().sum().backward()
    assert gap(net.get_parameter("emb.weight").grad, plain.emb.weight.grad) == 0  # masks all ones
    net.zero_grad(), plain.zero_grad()
    mask = torch.rand(20, 8) < 0.5
    net.layers["head"].mask.copy_(mask)
    plain = growfx.unwrap(net)
    assert gap(net(ids), plain(ids)) == 0
    net(ids).square().sum().backward()
    plain(ids).square().sum().backward()
    assert gap(net.get_parameter("emb.weight").grad, torch.where(mask, plain.emb.weight.grad, 0)) < 1e-5


# -- caches, lengths, numbers -----------------------------------------------------------------------------------------


@functools.lru_cache
def halves(n):
    return n // 2


@functools.cache
def positions(n):
    return torch.arange(n)


TABLE: dict[int, torch.Tensor] = {}


def remembered(n):
    if n not in TABLE:
        TABLE[n] = torch.arange(n, dtype=torch.float32)
    return TABLE[n]


class Repository:
    sizes: dict[int, int] = {}  # noqa: RUF012

    @staticmethod
    @functools.lru_cache
    def double(n):
        return 2 * n


FREE: dict[str, Any] = {
    "len": lambda x: x.reshape(len(x), 2, 4),
    "int of a quotient": lambda x: x.reshape(int(x.shape[0] * 2 / 2), 2, 4),
    "lru_cache": lambda x: x.reshape(halves(x.shape[0] * 2), 2, 4),
    "cached tensor": lambda x: x + positions(x.shape[0])[:, None],
    "table": lambda x: x + remembered(x.shape[0])[:, None],
    "cached method": lambda x: x.reshape(Repository.double(x.shape[0]), 4),
    "numpy product": lambda x: x.reshape(np.prod([x.shape[0], 2]), 4),
    "numpy root": lambda x: x / np.sqrt(x.shape[1]),
    "math": lambda x: x.reshape(round(x.shape[0] ** 1.0), -1),
    "list of sizes": lambda x: torch.cat([x[i : i + 1] for i in range(x.shape[0])]) if x.shape[0] < 0 else x,
    "copy by class": lambda x: torch.Tensor(x) * 2,
}


@pytest.mark.parametrize("use", some(FREE, lambda one: one in list(FREE)[::3]))
def test_numbers_that_python_makes_of_the_batch_size_follow_it(use):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return FREE[use](self.fc(x))

    TABLE.clear(), halves.cache_clear(), positions.cache_clear(), Repository.double.cache_clear()
    model = Net()
    net = growfx.wrap(model, torch.randn(1, 8))
    assert TABLE == {}
    assert (
        halves.cache_info().currsize == positions.cache_info().currsize == Repository.double.cache_info().currsize == 0
    )
    assert net.trace_report.faithful
    again = growfx.wrap(Net(), torch.randn(1, 8))  # a second model of the class
    assert again.trace_report.faithful
    for rows in (1, 2, 7):
        x = torch.randn(rows, 8)
        assert torch.equal(net(x), model(x))
        assert torch.equal(net.graph_module()(x), model(x))
    assert all(type(n) is int for n in TABLE)
    assert growfx.path_products(net).scores


def test_branches_by_device_see_the_models_own():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            offset = torch.ones(4, device=x.device)
            if x.device.type == "meta" or x.is_meta or self.fc.weight.device.type == "meta":
                return self.fc(x)
            return self.fc(x).to(x.device) + offset + torch.zeros_like(x).to("cpu")

    model = Places()
    net = growfx.wrap(model, torch.randn(2, 4))
    assert net.trace_report.faithful
    x = torch.randn(3, 4)
    assert torch.equal(net.graph_module()(x), model(x))


# -- outputs ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Out(collections.OrderedDict):
    sample: torch.Tensor

    def __post_init__(self):
        super().__setitem__("sample", self.sample)


class Cache:
    def __init__(self, states):
        self.states = states


RETURNS: dict[str, Any] = {
    "dict and dataclass": lambda y: Out(sample=y),
    "dataclass": Batch,
    "an object beside": lambda y: (y, Cache(y)),
    "an object in a dict": lambda y: {"y": y, "cache": Cache(y)},
}


@pytest.mark.parametrize("kind", RETURNS)
def test_outputs_of_any_class_are_recorded(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return RETURNS[kind](self.fc(x))

    net = growfx.wrap(Net(), torch.randn(2, 4))
    assert net.trace_report.faithful
    assert set(growfx.path_products(net).scores) == {"fc"}
    assert type(net(torch.randn(3, 4))) is type(net.shell(torch.randn(3, 4)))


# -- models that were used, compiled, pruned, or cannot be copied -----------------------------------------------------


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(4, 4), []

    def forward(self, x):
        self.last = self.fc(x)
        self.seen = [self.last, {"x": self.last}]
        return self.last.relu()


def test_a_model_that_keeps_an_activation_can_be_wrapped_and_unwrapped():
    model = Keeps()
    model(torch.randn(2, 4))
    net = growfx.wrap(model, torch.randn(2, 4), density=0.5)
    x = torch.randn(3, 4)
    out = net(x)
    plain = growfx.unwrap(net)
    assert torch.equal(plain(x), out)
    assert torch.equal(copy.deepcopy(net)(x), out)
    assert model.last.shape == (2, 4)


def test_what_cannot_be_copied_is_shared():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lock = nn.Linear(4, 4), threading.Lock()

        def forward(self, x):
            with self.lock:
                return self.fc(x)

    net = growfx.wrap(Locked(), torch.randn(2, 4))
    assert net.trace_report.faithful
    assert net(torch.randn(3, 4)).shape == (3, 4)
    assert growfx.unwrap(net)(torch.randn(3, 4)).shape == (3, 4)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_layers_with_a_normalised_weight_run_and_are_listed(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), nn.Conv1d(8, 2, 1)).eval()
    net = growfx.wrap(model, torch.randn(2, 4, 10))
    assert list(net.layers) == ["2"]
    assert any(name.startswith("0") for name in net.trace_report.unmasked)
    x = torch.randn(3, 4, 10)
    assert torch.equal(net(x), model(x))


def test_a_compiled_model_is_masked_as_the_original():
    for compiled in (True, False):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        x, expected = torch.randn(3, 4), None
        expected = model(x)
        if compiled:
            given = torch.compile(model, backend="eager")
        else:
            model.compile(backend="eager")
            given = model
        with pytest.warns(growfx.GrowfxWarning, match="compile the result"):
            net = growfx.wrap(given, torch.randn(2, 4))
        assert len(net.layers) == 2
        assert net.trace_report.faithful
        assert any("compile" in note for note in net.trace_report.notes)
        assert torch.equal(net(x), expected)
        net.set_masks({name: torch.zeros_like(mask) for name, mask in net.masks.items()})
        assert gap(net(x), growfx.unwrap(net)(x)) == 0


def test_lazy_modules_are_refused_by_name():
    with pytest.raises(growfx.ConfigError, match=r"`0\.weight` has no shape"):
        growfx.wrap(nn.Sequential(nn.LazyLinear(4), nn.ReLU()), torch.randn(2, 4))


# -- surgery ----------------------------------------------------------------------------------------------------------


SURGERY: dict[str, Any] = {
    "assigned": lambda net: setattr(net, "fc", nn.Linear(8, 3)),
    "assigned in the shell": lambda net: setattr(net.shell, "fc", nn.Linear(8, 3)),
    "set_submodule": lambda net: net.set_submodule("fc", nn.Linear(8, 3)),
    "container": lambda net: setattr(net, "body", nn.Sequential(nn.Linear(4, 8))),
    "deleted": lambda net: delattr(net, "fc"),
    "parametrized": lambda net: nn.utils.parametrizations.weight_norm(net.fc),
    "pruned": lambda net: prune.l1_unstructured(net.fc, "weight", 0.5),
    "old spectral norm": lambda net: nn.utils.spectral_norm(net.fc),
}


class Surgical(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Linear(4, 8)), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.body(x).relu())


@pytest.mark.parametrize("way", some(SURGERY, lambda one: one in list(SURGERY)[::3]))
def test_a_replaced_layer_is_named_at_the_next_use(way, tmp_path):
    for use in (
        lambda net: net(torch.randn(2, 4)),
        lambda net: net.density,
        lambda net: net.set_masks({"fc": torch.ones(2, 8, dtype=torch.bool)}),
        lambda net: growfx.save(net, tmp_path / "artifact"),
        growfx.unwrap,
        growfx.path_products,
    ):
        net = growfx.wrap(Surgical(), torch.randn(2, 4), density=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            SURGERY[way](net)
        with pytest.raises(growfx.MaskError, match=r"`(fc|body\.0)"):
            use(net)
    assert not (tmp_path / "artifact").exists()


TRACERS: dict[str, Any] = {
    "symbolic_trace": torch.fx.symbolic_trace,
    "jit.trace": lambda net: torch.jit.trace(net, torch.randn(2, 4)),
    "jit.script": torch.jit.script,
}


@pytest.mark.parametrize("way", TRACERS)
def test_other_tracers_are_told_to_work_on_the_plain_model(way):
    net = growfx.wrap(Surgical(), torch.randn(2, 4), density=0.5).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(growfx.TraceError, match="unwrap"):
            TRACERS[way](net)
        assert TRACERS[way](growfx.unwrap(net)) is not None


# -- threads ----------------------------------------------------------------------------------------------------------


def test_threads_record_and_run_at_once():
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))  # the compiler is there
    calls = nn.Module.__call__
    net = growfx.wrap(
        nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3)), torch.randn(1, 1, 16), density=0.5
    )
    net.eval()
    plain = growfx.unwrap(net)
    barrier, wrong = threading.Barrier(6), []

    def work(number):
        barrier.wait()
        for turn in range(4):
            x = torch.randn(1, 1, 12 + 4 * number + turn)
            if number % 2:
                if not torch.equal(net(x), plain(x)):
                    wrong.append(number)
            elif {str(n.target) for n in net.graph_at(x).nodes if n.op == "call_module"} != {"0", "1", "2"}:
                wrong.append(number)
            elif number == 4:
                growfx.wrap(nn.Sequential(nn.Linear(4, 4)), torch.randn(1, 4))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert nn.Module.__call__ is calls
    asked: list[int] = []
    torch.compile(nn.Linear(2, 2), backend=lambda graph, _: asked.append(1) or graph.forward)(torch.ones(1, 2))
    assert asked  # and compiles
    assert torch.equal(net(torch.ones(1, 1, 20)), plain(torch.ones(1, 1, 20)))


# -- transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_transforms_of_torch_func_see_the_masks(training):
    torch.manual_seed(0)
    net = growfx.wrap(Surgical(), torch.randn(2, 4), density=0.5).train(training)
    plain = growfx.unwrap(net)
    x, y = torch.randn(5, 4), torch.randn(5, 2)

    def loss(model):
        def of(parameters, a, b):
            return (torch.func.functional_call(model, parameters, (a[None],))[0] - b).square().sum()

        return of

    ours = {k: v.detach() for k, v in net.named_parameters()}
    theirs = {k: v.detach() for k, v in plain.named_parameters()}
    each = torch.vmap(torch.func.grad(loss(net)), (None, 0, 0))(ours, x, y)
    expected = torch.vmap(torch.func.grad(loss(plain)), (None, 0, 0))(theirs, x, y)
    for name, gradient in each.items():
        mask = net.masks.get(name.removesuffix(".weight")) if name.endswith("weight") else None
        wanted = expected[name] if mask is None else torch.where(mask, expected[name], 0)
        torch.testing.assert_close(gradient, wanted)
    torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)))(ours)
    foreign = {k: torch.ones_like(v) for k, v in ours.items()}
    torch.func.functional_call(net, foreign, (x,))
    assert all(bool((v == 1).all()) for v in foreign.values())  # nothing of the caller's is written to


def test_a_method_of_the_model_that_writes_a_checkpoint_writes_the_plain_models(tmp_path):
    class Saves(Surgical):
        def save_pretrained(self, path):
            torch.save(self.state_dict(), path)

    for masked in ((), ["fc.bias"]):
        net = growfx.wrap(Saves(), torch.randn(2, 4), density=0.5, masked=masked)
        net.layers["fc"].mask.copy_(torch.rand(2, 8) < 0.3)
        net.save_pretrained(tmp_path / "weights.pt")
        plain = Saves()
        plain.load_state_dict(torch.load(tmp_path / "weights.pt"))
        x = torch.randn(3, 4)
        assert gap(plain(x), net(x)) == 0
        assert "fc.mask" in net.state_dict()
        assert "fc.mask" in copy.deepcopy(net).state_dict()
        assert not growfx.unwrap(net)._state_dict_hooks


@pytest.mark.parametrize("training", [True, False])
def test_the_fused_path_of_torchs_encoder_sees_the_masks(training):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    net = growfx.wrap(nn.Sequential(encoder, nn.Linear(8, 2)), torch.randn(2, 5, 8)).train(training)
    x = torch.randn(3, 5, 8)
    for layer in net.layers.values():
        layer.mask.copy_(torch.rand(layer.mask.shape) < 0.5)
    plain = growfx.unwrap(net)
    with torch.no_grad():
        assert gap(net(x), plain(x)) < 1e-6
    net(x).square().sum().backward()
    plain(x).square().sum().backward()
    for name, layer in net.layers.items():
        gradient = plain.get_submodule(name).get_parameter(layer.weight_name).grad
        assert gap(layer.parameter.grad, torch.where(layer.mask, gradient, 0)) < 1e-5


def test_masks_of_torchs_pruning_are_taken_over_and_its_checkpoints_load():
    model = Surgical()
    for layer in (model.fc, model.body[0]):
        prune.l1_unstructured(layer, "weight", 0.5)
    x = torch.randn(3, 4)
    expected = model(x)
    with pytest.warns(growfx.GrowfxWarning, match="taken over"):
        net = growfx.wrap(model, torch.randn(2, 4))
    assert list(net.layers) == ["body.0", "fc"]
    assert torch.equal(net.masks["fc"], model.fc.weight_mask.bool())
    assert net.density == 0.5
    assert net.trace_report.faithful
    assert net.layers["fc"].parameter is model.fc.weight_orig
    assert gap(net(x), expected) == 0
    assert gap(model(x), expected) == 0
    plain = growfx.unwrap(net)
    assert set(plain.state_dict()) == set(Surgical().state_dict())
    assert gap(plain(x), expected) == 0
    other = growfx.wrap(Surgical(), torch.randn(2, 4))
    other.load_state_dict(model.state_dict())
    assert other.mask_digest() == net.mask_digest()
    assert gap(other(x), expected) == 0


def test_what_torchs_pruning_left_out_stays_out_where_its_mask_is_not_taken_over():
    x = torch.randn(3, 4)
    model = Surgical()
    prune.l1_unstructured(model.fc, "weight", 0.5)
    expected = model(x)
    assert gap(growfx.wrap(model, x, exclude=["fc"])(x), expected) == 0
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    prune.l1_unstructured(tied[0], "weight", 0.5)
    expected = tied(x)
    assert gap(growfx.wrap(tied, x)(x), expected) == 0
    single = prune.l1_unstructured(nn.Linear(4, 2), "weight", 0.5)
    expected = single(x)
    assert gap(growfx.wrap(single, x)(x), expected) == 0


def test_a_mask_of_torchs_pruning_that_has_factors_is_computed_with():
    x = torch.randn(3, 4)
    model = Surgical()
    factors = torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(2, 2)
    prune.l1_unstructured(model.body[0], "weight", 0.5)
    prune.custom_from_mask(model.fc, "weight", factors)
    expected = model(x)
    with pytest.warns(growfx.GrowfxWarning, match="taken over"):
        net = growfx.wrap(model, x)
    assert gap(net(x), expected) == 0
    assert "fc" in net.trace_report.unmasked
    other = growfx.wrap(Surgical(), x)
    other.load_state_dict(model.state_dict())
    assert gap(other(x), expected) == 0
    assert torch.equal(other.masks["fc"], factors != 0)


def test_drawing_masks_over_those_of_torchs_pruning_is_told():
    model = Surgical()
    prune.l1_unstructured(model.fc, "weight", 0.5)
    with pytest.warns(growfx.GrowfxWarning, match="drawn at density 0.25"):
        assert growfx.wrap(model, torch.randn(2, 4), density=0.25).density == 0.25


def test_a_model_that_was_unwrapped_has_no_trace_and_wraps_again():
    net = growfx.wrap(Surgical(), torch.randn(2, 4), density=0.5)
    plain = growfx.unwrap(net)
    assert vars(plain.fc).keys() == vars(Surgical().fc).keys()
    again = growfx.wrap(plain, torch.randn(2, 4))
    assert type(again.get_submodule("fc")) is type(net.get_submodule("fc"))
