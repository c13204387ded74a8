"""What `growfx.wrap` finds in the caller's hands it leaves as it was, and it says what two of them share."""

import collections
import copy
import functools
import gc
import random
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from breadth import some
from torch import Tensor, nn

import growfx

# -- forwards that write ----------------------------------------------------------------------------------------------


def through_data(module: Any) -> None:
    module.fc.weight.data.mul_(0.5)


def without_gradient(module: Any) -> None:
    with torch.no_grad():
        module.fc.weight.clamp_(-0.1, 0.1)


def by_index(module: Any) -> None:
    module.fc.weight.data[0] = 0.0


def by_out(module: Any) -> None:
    torch.mul(module.fc.weight.data, 0.5, out=module.fc.weight.data)


def by_foreach(module: Any) -> None:
    torch._foreach_mul_([p.data for p in module.fc.parameters()], 0.5)


def by_numpy(module: Any) -> None:
    module.fc.weight.detach().numpy()[:] *= 0.5


def anew(module: Any) -> None:
    module.fc.weight.data = module.fc.weight.data * 0.5


def by_init(module: Any) -> None:
    nn.init.normal_(module.fc.weight)


def in_a_buffer(module: Any) -> None:
    module.count.add_(1)


WRITES = [through_data, without_gradient, by_index, by_out, by_foreach, by_numpy, anew, by_init, in_a_buffer]


class Writes(nn.Module):
    calls = 0
    log: list[int] = []  # noqa: RUF012

    def __init__(self, write: Any, opaque: bool) -> None:
        super().__init__()
        self.fc, self.write, self.opaque = nn.Linear(4, 4), write, opaque
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        self.log.append(1)
        self.write(self)
        if self.opaque and float(x.sum()) > 1e9:
            return x
        return self.fc(x)


@pytest.mark.parametrize("opaque", some([True, False], lambda opaque: opaque))
@pytest.mark.parametrize("write", WRITES)
def test_a_forward_that_writes_to_weights_buffers_or_its_class_writes_nothing_at_wrap(write: Any, opaque: bool) -> None:
    Writes.calls = 0
    Writes.log.clear()
    model = nn.Sequential(Writes(write, opaque), nn.Linear(4, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    net = growfx.wrap(model, torch.randn(2, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert Writes.calls == 0
    assert Writes.log == []
    reference, x = copy.deepcopy(model), torch.randn(3, 4)
    torch.manual_seed(0)
    expected = reference(x)
    torch.manual_seed(0)
    assert torch.equal(net(x), expected)
    changed = {k: v.clone() for k, v in reference.state_dict().items()}
    ours = net.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in changed.items())


def local_class() -> nn.Module:
    class Counts(nn.Module):
        calls, seen = 0, []

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            Counts.calls += 1
            self.seen.append(x.shape)
            return self.fc(x)

    return Counts()


def test_counters_and_lists_of_a_class_made_in_a_function_are_left_as_they_were() -> None:
    model: Any = local_class()
    net = growfx.wrap(model, torch.randn(2, 4))
    net.graph_at(torch.randn(2, 3, 4))
    assert (type(model).calls, type(model).seen) == (0, [])
    net(torch.randn(2, 4))
    assert (type(model).calls, len(type(model).seen)) == (1, 1)


def test_caches_of_a_class_made_in_a_function_are_left_as_they_were() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        @functools.lru_cache  # noqa: B019
        def twice(self, n: int) -> int:
            return 2 * n

        @staticmethod
        @functools.cache
        def halved(n: int) -> float:
            return n / 2

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).reshape(self.twice(x.shape[0]), -1) * self.halved(x.shape[0])

    net = growfx.wrap(Caches(), torch.randn(2, 4))
    assert Caches.twice.cache_info().currsize == Caches.halved.cache_info().currsize == 0
    assert torch.equal(net(torch.ones(3, 4)), growfx.unwrap(net)(torch.ones(3, 4)))
    Caches.twice.cache_clear()


# -- generators and clocks --------------------------------------------------------------------------------------------

OF_MODULE = np.random.default_rng(0)


class Draws(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.fc, self.draw = nn.Linear(4, 4), draw
        self.numpy, self.old, self.python = np.random.default_rng(0), np.random.RandomState(0), random.Random(0)
        self.torch = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.draw(self)


class FromModule(Draws):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * float(OF_MODULE.random())


def closing_over(generator: Any) -> type[nn.Module]:
    class FromClosure(Draws):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * float(generator.random())

    return FromClosure


DRAWS: dict[str, Any] = {
    "numpy": lambda m: float(m.numpy.random()),
    "numpy's older": lambda m: float(m.old.rand()),
    "python": lambda m: m.python.random(),
    "torch": lambda m: float(torch.rand((), generator=m.torch)),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("draw", [*DRAWS, "global", "closure"])
def test_a_generator_of_the_models_own_is_not_frozen_in_a_graph_and_not_moved_on_by_wrap(
    draw: str, inside: bool
) -> None:
    closed = np.random.default_rng(7)
    kinds = {"global": FromModule, "closure": closing_over(closed)}
    part = kinds.get(draw, Draws)(DRAWS.get(draw))
    model = nn.Sequential(part, nn.Linear(4, 2)) if inside else part
    states = [repr(g.bit_generator.state) for g in (part.numpy, OF_MODULE, closed)]
    states += [repr(part.old.get_state()), repr(part.python.getstate()), repr(part.torch.get_state().tolist())]
    net = growfx.wrap(model, torch.randn(2, 4))
    after = [repr(g.bit_generator.state) for g in (part.numpy, OF_MODULE, closed)]
    after += [repr(part.old.get_state()), repr(part.python.getstate()), repr(part.torch.get_state().tolist())]
    assert after == states
    assert any("random number" in why or "Generator" in why for why in net.trace_report.opaque.values())
    assert net.trace_report.faithful is inside
    with pytest.raises(growfx.TraceError, match=r"random number|Generator"):
        net.graph_module()
    x = torch.randn(2, 4)
    assert not torch.equal(net(x), net(x))


CLOCKS: dict[str, Any] = {
    "time": lambda _: time.time(),
    "perf_counter": lambda _: time.perf_counter(),
    "monotonic": lambda _: time.monotonic() % 1,
    "nanoseconds": lambda _: (time.time_ns() // 10**9) % 977,
}


@pytest.mark.parametrize("clock", some(CLOCKS, lambda clock: clock == "time"))
def test_a_time_that_a_model_computes_with_is_not_taken_for_a_constant(clock: str) -> None:
    clocks = {name: getattr(time, name) for name in ("time", "perf_counter", "monotonic", "time_ns")}
    net = growfx.wrap(Draws(CLOCKS[clock]), torch.randn(2, 4))
    assert not net.trace_report.faithful
    assert net.trace_report.notes
    assert all(getattr(time, name) is function for name, function in clocks.items())
    with pytest.raises(growfx.TraceError, match="differs"):
        net.graph_module()


def test_a_model_that_only_measures_its_time_is_recorded() -> None:
    seen: list[float] = []

    def measured(module: Any) -> float:
        started = time.perf_counter()
        seen.append(time.perf_counter() - started)
        return 1.0

    assert growfx.wrap(Draws(measured), torch.randn(2, 4)).trace_report.faithful


# -- two nets ---------------------------------------------------------------------------------------------------------


def test_a_second_net_over_the_same_parameters_is_warned_of_once_and_one_over_a_copy_is_not() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    first = growfx.wrap(model, torch.randn(2, 4))
    with pytest.warns(growfx.GrowfxWarning, match=r"another net masks.*`0\.weight`") as caught:
        second = growfx.wrap(model, torch.randn(2, 4), density=0.5)
    assert len(caught) == 1
    assert any("another net" in note for note in second.trace_report.notes)
    x = torch.randn(3, 4)
    assert torch.equal(first(x), second(x))
    with pytest.warns(growfx.GrowfxWarning, match="another net"):  # a part of it is shared too
        growfx.wrap(nn.Sequential(model[2]), torch.randn(2, 8))
    growfx.wrap(copy.deepcopy(model), torch.randn(2, 4))
    growfx.wrap(growfx.unwrap(second), torch.randn(2, 4))
    digest = second.mask_digest()
    del first, second
    gc.collect()
    assert growfx.wrap(model, torch.randn(2, 4)).mask_digest() != digest


# -- names ------------------------------------------------------------------------------------------------------------

NAMES = ("masks", "density", "layers", "recording", "example", "nnz", "numel", "graph", "code", "meta", "recordings")


def test_a_model_sees_its_own_attributes_where_the_net_has_others_of_that_name() -> None:
    class Names(nn.Module):
        verify = None

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            for number, name in enumerate(NAMES):
                setattr(self, name, float(number + 1))
            self.identity = None

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.total()

        def total(self) -> float:
            return sum(getattr(self, name) for name in NAMES)

        def settle(self) -> str:
            return "the model's"

    model = Names()
    with pytest.warns(growfx.GrowfxWarning, match="net.shell") as caught:
        net = growfx.wrap(model, torch.randn(2, 4), density=0.5)
    (warning,) = caught
    assert all(f"`{name}`" in str(warning.message) for name in (*NAMES, "settle"))
    assert not any(f"`{name}`" in str(warning.message) for name in ("identity", "verify", "forward", "fc", "total"))
    assert net.density == 0.5
    assert net.nnz == 8
    assert list(net.layers) == ["fc"]
    assert net.total() == model.total() == sum(range(1, len(NAMES) + 1))
    assert net.shell.density == model.density
    assert net.shell.settle() == "the model's"
    x = torch.randn(3, 4)
    plain = growfx.unwrap(net)
    assert torch.equal(net(x), plain(x))
    assert plain.density == model.density
    assert torch.equal(copy.deepcopy(net)(x), plain(x))


def test_ordinary_models_hide_nothing() -> None:
    for model in (nn.Sequential(nn.Linear(4, 2)), torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 2)))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            growfx.wrap(model, torch.randn(2, 4))


def test_length_iteration_and_membership_are_those_of_the_model() -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
    assert len(net) == 3
    assert [type(part).__name__ for part in net] == ["MaskedLinear", "ReLU", "MaskedLinear"]
    assert net[-1] in net
    assert bool(net)

    class Parts(nn.ModuleDict):
        def forward(self, x: Tensor) -> Tensor:
            return self["b"](self["a"](x))

    named = growfx.wrap(Parts({"a": nn.Linear(4, 4), "b": nn.Linear(4, 2)}), torch.randn(2, 4))
    assert list(named) == ["a", "b"]
    assert "a" in named
    other = growfx.wrap(local_class(), torch.randn(2, 4))
    assert other
    with pytest.raises(TypeError):
        len(other)


def test_a_parameter_to_mask_may_be_named_by_any_of_its_names() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.ParameterDict({"w": torch.randn(4, 4)}), nn.Module()
            self.b.register_parameter("w", self.a["w"])
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((x @ self.a["w"]).relu() @ self.b.w)

    for pattern, name in (("b.w", "b.w"), ("a.w", "a.w"), ("*.w", "a.w")):
        net = growfx.wrap(Aliased(), torch.randn(2, 4), masked=[pattern], density=0.5)
        assert set(net.layers) == {name, "fc"}
        assert not any(key.endswith(".w") for key in net.trace_report.unmasked)
        x, plain = torch.randn(3, 4), growfx.unwrap(net)
        assert torch.equal(net(x), plain(x))
        net(x).square().sum().backward()
        layer = net.layers[name]
        assert not layer.parameter.grad[~layer.mask].any()
        assert torch.equal(plain.a["w"], torch.where(layer.mask, plain.b.w, 0))
    tied = nn.Sequential(collections.OrderedDict(a=nn.Linear(4, 4), b=nn.Linear(4, 4)))
    tied.b.weight = tied.a.weight
    with pytest.raises(growfx.ConfigError, match="has a mask already"):
        growfx.wrap(tied, torch.randn(2, 4), masked=["b.weight"])


@pytest.mark.parametrize("option", ["exclude", "masked", "opaque"])
@pytest.mark.parametrize("value", [3, [3], ["fc", None], {"fc": 1, 2: 3}])
def test_patterns_that_are_no_texts_are_refused_by_name(option: str, value: Any) -> None:
    model = nn.Sequential(collections.OrderedDict(fc=nn.Linear(4, 2)))
    with pytest.raises(growfx.ConfigError, match=option):
        growfx.wrap(model, torch.randn(2, 4), **{option: value})
    assert type(model.fc) is nn.Linear


def test_a_layer_that_has_both_names_for_a_mask_keeps_both() -> None:
    class Both(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.mask, self.weight_mask = nn.Buffer(torch.full((4, 4), 0.5)), nn.Buffer(torch.full((4, 4), 2.0))

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return nn.functional.linear(input, self.weight * self.mask * self.weight_mask, self.bias)

    model, x = nn.Sequential(Both(), nn.Linear(4, 2)), torch.randn(3, 4)
    expected, keys = model(x), set(model.state_dict())
    net = growfx.wrap(model, torch.randn(2, 4))
    assert torch.equal(net(x), expected)
    net.set_masks({"0": torch.rand(4, 4) < 0.5})
    for other in (net, copy.deepcopy(net)):
        plain = growfx.unwrap(other)
        assert torch.equal(other(x), plain(x))
        assert set(plain.state_dict()) == keys
        assert torch.equal(plain[0].weight_mask, model[0].weight_mask)
    again = growfx.wrap(copy.deepcopy(model), torch.randn(2, 4))
    again.load_state_dict(net.state_dict())
    assert again.mask_digest() == net.mask_digest()


def test_the_default_device_does_not_matter_to_a_network_on_another() -> None:
    """As on a machine where `torch.set_default_device` names an accelerator; the meta device is another everywhere."""
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 6)
    with torch.device("meta"):
        net = growfx.wrap(model, x, density=0.4)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        method = growfx.methods.create("rigl", masks="given", density=None, update_every=1)
        method.attach(net, optimizer, total_steps=4, steps_per_epoch=2)
        for _ in range(3):
            net(x).square().sum().backward()
            optimizer.step()
            method.step()
            optimizer.zero_grad()
        plain = growfx.unwrap(net)
        assert growfx.path_products(net).scores["0"].device.type == "cpu"
    assert net.trace_report.faithful
    assert net.density == pytest.approx(0.4, abs=0.01)
    assert torch.equal(plain(x), net(x))


METHODS_OF_PATHS = {
    "pwmpr": {"seed_density": 0.3, "epochs_per_round": 1},
    "phew": {"density": 0.3},
    "channel-prune": {"budget": "params=0.6", "update_every": 1},
}


@pytest.mark.parametrize("name", METHODS_OF_PATHS)
def test_the_default_device_does_not_matter_to_methods_that_follow_paths(name: str) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 6)
    digests = set()
    for default in ("cpu", "meta"):
        with torch.device(default):
            net = growfx.wrap(copy.deepcopy(model), x)
            optimizer = torch.optim.SGD(net.parameters(), 0.1)
            method = growfx.methods.create(name, **METHODS_OF_PATHS[name])
            method.attach(net, optimizer, total_steps=4, steps_per_epoch=1)
            for _ in range(4):
                net(x).square().sum().backward()
                optimizer.step()
                method.step()
                method.report(0.5, 0.1)
                optimizer.zero_grad()
            compacted = growfx.unwrap(net, compact=True)
        digests.add(net.mask_digest())
        assert torch.allclose(compacted(x), net.eval()(x))
    assert len(digests) == 1
    assert net.density < 1
