"""MaskedGraph: the contract of `growfx.wrap`, `growfx.unwrap` and the network between them."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import fx, nn

import growfx
from growfx.errors import ConfigError, MaskError
from growfx.passes.record.recording import record


def model() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU())
    return Named(layers)


class Named(nn.Module):
    """Submodules with the names of MaskedGraph's own attributes."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.graph = layers, nn.Linear(8, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.graph(self.layers(x).mean((2, 3)))


EXAMPLE = torch.randn(2, 3, 7, 7)


def test_every_key_of_the_model_keeps_its_name_and_each_layer_adds_its_mask() -> None:
    original = model()
    net = growfx.wrap(original, EXAMPLE)
    assert isinstance(net, fx.GraphModule)
    assert isinstance(net, growfx.MaskedGraph)
    assert list(net.layers) == ["layers.0", "layers.3", "graph"]
    masks = {f"{name}.mask" for name in net.layers}
    assert set(net.state_dict()) == set(original.state_dict()) | masks
    assert all(net.state_dict()[m].dtype == torch.bool for m in masks)
    net.load_state_dict(original.state_dict())


def test_parameters_are_shared_and_the_model_itself_is_unchanged() -> None:
    original = model()
    net = growfx.wrap(original, EXAMPLE)
    ours = dict(net.named_parameters())
    assert all(ours[name] is parameter for name, parameter in original.named_parameters())
    assert type(original.layers[0]) is nn.Conv2d
    assert not hasattr(original.layers[0], "mask")


def test_with_all_ones_masks_outputs_and_gradients_equal_the_models() -> None:
    original = model()
    net = growfx.wrap(copy.deepcopy(original), EXAMPLE)
    x = torch.randn(5, 3, 7, 7)
    for mode in (True, False):
        a, b = net.train(mode)(x), original.train(mode)(x)
        assert torch.equal(a, b)
        a.sum().backward(), b.sum().backward()
    theirs = dict(original.named_parameters())
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad)


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_density_is_hit_exactly_and_follows_the_seed(density: float) -> None:
    nets = [growfx.wrap(model(), EXAMPLE, density=density, seed=s) for s in (0, 0, 1)]
    for net in nets:
        assert net.nnz == round(density * net.numel) == sum(int(layer.mask.sum()) for layer in net.layers.values())
        net.verify()
    assert nets[0].mask_digest() == nets[1].mask_digest()
    assert (nets[0].mask_digest() == nets[2].mask_digest()) == (density == 1)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_a_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(growfx.ConfigError, match=r"density is .*\(0, 1\]"):
        growfx.wrap(model(), EXAMPLE, density=density)


def test_the_report_names_what_is_left_out_and_why() -> None:
    net = growfx.wrap(model(), EXAMPLE, exclude=["gr*"])
    report = net.trace_report
    assert report.layers == list(net.layers) == ["layers.0", "layers.3"]
    assert report.unmasked == {"graph": "excluded by `gr*`", "unused": "never called"}
    assert report.faithful
    assert not report.opaque
    assert "never called" in str(report)


def test_an_exclude_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(growfx.ConfigError, match=r"no convolution, linear layer or attention is named like.*head"):
        growfx.wrap(model(), EXAMPLE, exclude=["head*"])


def test_bad_masks_are_refused_and_change_nothing() -> None:
    net = growfx.wrap(model(), EXAMPLE, density=0.5)
    before = net.mask_digest()
    good = torch.zeros_like(net.layers["graph"].mask)
    bad = {
        "head": (good, "`head` is not a masked layer; the masked layers are `layers.0`"),
        "layers.0": (good, r"mask of `layers.0` has shape \(4, 8\); its weight has shape \(8, 3, 3, 3\)"),
        "layers.3": (torch.ones(8, 1, 3, 3), "mask of `layers.3` is torch.float32; give a bool tensor"),
    }
    for name, (mask, message) in bad.items():
        with pytest.raises(growfx.MaskError, match=message):
            net.set_masks({"graph": good, name: mask})
    assert net.mask_digest() == before


def test_an_assigned_mask_is_that_of_every_layer_with_the_weight_and_a_bad_one_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.w = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(4, 3))
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu()) @ self.w

    net = growfx.wrap(Tied(), torch.randn(2, 4), masked=["w"]).eval()
    masks = {name: torch.rand(layer.mask.shape) < 0.5 for name, layer in net.layers.items()}
    for name, mask in masks.items():
        net.layers[name].mask = mask
    x, plain = torch.randn(5, 4), growfx.unwrap(net)
    assert all(torch.equal(net.masks[name], mask) for name, mask in masks.items())
    assert torch.equal(net.get_submodule("b").mask, masks["a"])
    assert torch.equal(net(x), plain(x))
    net.train()(x).sum().backward()
    gradients = {"a": net.shell.a.weight.grad, "w": net.shell.w.grad}
    assert all(not gradients[name][~mask].any() for name, mask in masks.items())
    digest = net.mask_digest()
    for bad, words in ((torch.ones(4, 4), "torch.float32"), (torch.ones(2, dtype=torch.bool), "shape"), (None, "None")):
        for layer in net.layers.values():
            with pytest.raises(growfx.MaskError, match=words):
                layer.mask = bad
    assert net.mask_digest() == digest


def test_a_mask_free_state_dict_loads_weights_and_leaves_the_masks() -> None:
    net = growfx.wrap(model(), EXAMPLE, density=0.5)
    digest, other = net.mask_digest(), model()
    net.load_state_dict(other.state_dict())
    assert net.mask_digest() == digest
    net.verify()
    layer = net.layers["graph"]
    assert torch.equal(layer.parameter, torch.where(layer.mask, other.graph.weight, 0))


def test_a_state_dict_with_some_masks_missing_or_misshapen_is_refused_by_name() -> None:
    net = growfx.wrap(model(), EXAMPLE, density=0.5)
    state = net.state_dict()
    missing = {k: v for k, v in state.items() if k != "layers.3.mask"}
    with pytest.raises(growfx.MaskError, match=r"has 2 of 3 masks; missing: `layers.3.mask`"):
        net.load_state_dict(missing)
    with pytest.raises(growfx.MaskError, match=r"`graph` has shape \(8, 4\)"):
        net.load_state_dict({**state, "graph.mask": state["graph.mask"].T})


def test_masks_and_weights_survive_a_state_dict_round_trip() -> None:
    net = growfx.wrap(model(), EXAMPLE, density=0.3)
    other = growfx.wrap(model(), EXAMPLE, density=0.9, seed=7)
    other.load_state_dict(net.state_dict())
    assert other.mask_digest() == net.mask_digest()
    x = torch.randn(3, 3, 7, 7)
    assert torch.equal(other.eval()(x), net.eval()(x))


def test_the_digest_depends_on_names_shapes_and_masks_only() -> None:
    net = growfx.wrap(model(), EXAMPLE, density=0.5)
    digest = net.mask_digest()
    with torch.no_grad():
        net.layers["graph"].parameter.mul_(2)
    assert net.mask_digest() == digest
    flipped = net.layers["graph"].mask.clone()
    flipped[0, 0] = ~flipped[0, 0]
    net.set_masks({"graph": flipped})
    assert net.mask_digest() != digest


def test_unwrapping_gives_the_original_class_with_plus_zeros_baked_in() -> None:
    net = growfx.wrap(model(), EXAMPLE, density=0.2).eval()
    plain = growfx.unwrap(net)
    assert type(plain) is Named
    assert type(plain.layers[0]) is nn.Conv2d
    assert set(plain.state_dict()) == set(model().state_dict())
    for name, layer in net.layers.items():
        weight = plain.get_submodule(name).weight
        assert torch.equal(weight == 0, ~layer.mask | (layer.parameter == 0))
        assert not torch.signbit(weight[~layer.mask]).any()
    x = torch.randn(3, 3, 7, 7)
    assert torch.equal(plain(x), net(x))
    assert not plain.training
    assert all(not m.training for m in plain.modules())


def test_tied_weights_share_one_mask_and_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    net = growfx.wrap(Tied(), torch.randn(2, 4), density=0.5)
    assert list(net.layers) == ["a"]
    assert net.trace_report.tied == {"b": "a"}
    assert net.numel == 16
    for step in (lambda n: n, lambda n: n.double().float(), copy.deepcopy):
        net = step(net)
        net.layers["a"].mask[0] = False
        assert torch.equal(net.get_submodule("b").mask, net.layers["a"].mask)
        net.layers["a"].mask[0] = True
    x = torch.randn(3, 4)
    torch.testing.assert_close(net(x), growfx.unwrap(net)(x))


def test_a_deep_copy_is_independent_and_computes_the_same() -> None:
    net = growfx.wrap(model(), EXAMPLE, density=0.5).eval()
    other = copy.deepcopy(net)
    x = torch.randn(3, 3, 7, 7)
    assert torch.equal(other(x), net(x))
    other.set_masks({"graph": torch.zeros_like(other.layers["graph"].mask)})
    assert not torch.equal(other(x), net(x))
    assert str(other.graph) == str(net.graph)
    assert other.graph is not net.graph
    assert other(torch.randn(2, 3, 9, 9)).shape == (2, 4)


def test_the_recorded_program_runs_and_can_be_edited() -> None:
    with pytest.raises(growfx.TraceError, match="submodule `graph`"):
        growfx.wrap(model(), EXAMPLE).graph_module()

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).mean((2, 3))
            return self.head(x) + nn.functional.linear(x, self.head.weight)

    net = growfx.wrap(Direct(), EXAMPLE, density=0.5).eval()
    x = torch.randn(3, 3, 7, 7)
    before = net(x)
    module = net.graph_module()
    assert type(module).__name__ == type(net.shell).__name__
    assert torch.equal(module(x), before)
    net.set_masks({"head": ~net.layers["head"].mask})  # the same masked layers
    before = net(x)
    assert torch.equal(module(x), before)
    output = next(n for n in module.graph.nodes if n.op == "output")
    with module.graph.inserting_before(output):
        doubled = module.graph.call_function(torch.mul, (output.args[0], 2))
    output.args = (doubled,)
    module.recompile()
    assert torch.equal(module(x), 2 * before)
    assert torch.equal(net(x), before)


def test_the_shown_graph_is_that_of_the_mode() -> None:
    class Moded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).sin() if self.training else self.fc(x).cos()

    net = growfx.wrap(Moded(), torch.randn(2, 4))
    assert "sin" in net.train().code
    assert "cos" not in net.code
    assert "cos" in net.eval().code


def test_example_inputs_have_the_recorded_shape_and_any_batch() -> None:
    net = growfx.wrap(model(), EXAMPLE)
    assert net.example_inputs(batch=4)[0].shape == (4, 3, 7, 7)
    assert net.graph_at(*net.example_inputs()) is net.eval().graph


def test_what_cannot_be_wrapped_says_so() -> None:
    net = growfx.wrap(model(), EXAMPLE)
    with pytest.raises(growfx.TraceError, match="a MaskedGraph already"):
        growfx.wrap(net)
    with pytest.raises(growfx.TraceError, match=r"expects an nn\.Module, got str"):
        growfx.wrap("resnet18")
    with pytest.raises(growfx.TraceError, match=r"expects a growfx.MaskedGraph, got `Named`"):
        growfx.unwrap(model())
    with pytest.raises(growfx.TraceError, match=r"example_inputs .* got list"):
        growfx.wrap(model(), [EXAMPLE])


def test_a_model_with_masked_parts_is_refused_by_the_name_of_the_part() -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(1, 4), density=0.5)
    masks = {name: mask.clone() for name, mask in net.masks.items()}
    for around, name in (
        (nn.Sequential(nn.ReLU(), net), "`1` of the model is a MaskedGraph already"),
        (nn.ModuleDict({"body": nn.Sequential(net)}), "`body.0` of the model is a MaskedGraph already"),
        (nn.Sequential(copy.deepcopy(net)), "`0` of the model is a MaskedGraph already"),
        (nn.Sequential(nn.ReLU(), net.layers["0"]), "`1` of the model is a masked layer already"),
        (net.shell, "`0` of the model is a masked layer already"),
    ):
        with pytest.raises(growfx.TraceError, match=name):
            growfx.wrap(around, torch.randn(1, 4), density=0.9)
    assert all(torch.equal(net.masks[name], mask) for name, mask in masks.items())
    plain = nn.Sequential(growfx.unwrap(net), nn.Linear(2, 2))
    assert list(growfx.wrap(plain, torch.randn(1, 4)).layers) == ["0.0", "0.2", "1"]


def test_torch_compile_gives_the_same_results_before_and_after_a_mask_change() -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 6), density=0.5)
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.randn(4, 6)
    for mode in (False, True):
        net.train(mode)
        torch.testing.assert_close(compiled(x), net(x))
        net.set_masks({"0": ~net.layers["0"].mask})
        torch.testing.assert_close(compiled(x), net(x))


def test_the_average_of_timm_and_of_torch_has_the_masks_of_the_moment() -> None:
    from timm.utils import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel

    net = growfx.wrap(model(), EXAMPLE, density=0.5).train()
    averages = [ModelEmaV3(net, decay=0.5), AveragedModel(net)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for i in range(4):
        net(torch.randn(4, 3, 7, 7)).pow(2).sum().backward()
        optimizer.step(), optimizer.zero_grad()
        if i == 1:
            net.set_masks({name: torch.rand(m.mask.shape) < 0.5 for name, m in net.layers.items()})
        averages[0].update(net), averages[1].update_parameters(net)
    for average in averages:
        inner = average.module
        assert inner.mask_digest() == net.mask_digest()
        saved = inner.state_dict()
        assert not any(bool(saved[f"{n}.weight"][~layer.mask].any()) for n, layer in inner.layers.items())


def test_attributes_and_methods_of_the_model_are_those_of_the_net() -> None:
    class Extra(Named):
        step = 3

        def no_weight_decay(self) -> set[str]:
            return {"graph.bias"}

    net = growfx.wrap(Extra(model().layers), EXAMPLE)
    assert net.no_weight_decay() == {"graph.bias"}
    assert net.step == 3
    assert not hasattr(net, "missing")
    with pytest.raises(AttributeError, match="missing"):
        net.missing  # noqa: B018


def test_a_method_of_the_model_is_refused_after_a_masked_layer_was_replaced() -> None:
    class Extra(Named):
        def features(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    net = growfx.wrap(Extra(model().layers), EXAMPLE, density=0.5)
    name = next(name for name in net.layers if name.startswith("layers."))
    net.shell.layers[int(name.removeprefix("layers."))] = nn.Identity()
    with pytest.raises(growfx.MaskError, match=f"`{name}` was replaced"):
        net.features(EXAMPLE)


def test_a_size_kept_by_the_model_is_a_plain_number_in_a_copy() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.rows = x.shape[0] * 2
            return self.fc(x)

    model = Keeps()
    record(model, (torch.randn(2, 4),))
    assert not hasattr(model, "rows")
    net = growfx.wrap(model, torch.randn(2, 4))
    net(torch.randn(3, 4))
    assert type(net.rows) is int
    assert net.rows == 6


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.t(), lambda w: w[2:]], ids=["whole", "turned", "part"])
def test_separate_parameters_in_the_same_memory_are_refused(view):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = nn.Parameter(view(model[0].weight.data))
    with pytest.raises(growfx.ConfigError, match=r"`0.weight` and `2.weight`.*same memory"):
        growfx.wrap(model, torch.randn(2, 4))
    assert growfx.wrap(model, torch.randn(2, 4), exclude=["*"]).numel == 0


def test_an_unmasked_parameter_in_the_memory_of_a_masked_one_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
            self.head.weight.data = self.table.weight.data

        def forward(self, ids):
            return self.head(self.table(ids))

    with pytest.raises(growfx.ConfigError, match=r"`head.weight` and `table.weight`"):
        growfx.wrap(Model(), torch.zeros(2, 3, dtype=torch.long))


def test_parameters_side_by_side_in_one_buffer_are_masked():
    flat = torch.randn(32)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight.data, model[1].weight.data = flat[:16].view(4, 4), flat[16:].view(4, 4)
    net = growfx.wrap(model, torch.randn(2, 4), density=0.5).eval()
    x = torch.randn(3, 4)
    assert torch.equal(growfx.unwrap(net)(x), net(x))


@pytest.mark.parametrize("name", ["density", "layers", "masks", "trace_report", "shell"])
def test_what_a_net_tells_of_itself_cannot_be_set(name: str) -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(4, 3)), torch.randn(1, 4), density=0.5)
    with pytest.raises(ConfigError, match=f"`net.shell.{name}`"):
        setattr(net, name, 1)
    assert net.density == 0.5


def test_a_part_of_the_model_that_is_called_like_something_of_the_net_can_be_set_through_it() -> None:
    net = growfx.wrap(Named(model().layers), EXAMPLE)
    net.layers = nn.Identity()
    assert isinstance(net.shell.layers, nn.Identity)


def test_the_table_of_layers_is_read_only() -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(1, 4), density=0.5)
    layers: Any = net.layers
    for write in (lambda: layers.pop("0"), lambda: layers.update({}), lambda: layers.__setitem__("0", nn.Linear(4, 3))):
        with pytest.raises(MaskError, match="set_masks"):
            write()
    with pytest.raises(MaskError, match="wrap the model again"):
        del layers["0"]
    copies = [copy.copy(layers), copy.deepcopy(layers), pickle.loads(pickle.dumps(layers)), copy.deepcopy(net).layers]
    assert all(list(copied) == list(net.layers) == ["0", "1"] for copied in copies)
