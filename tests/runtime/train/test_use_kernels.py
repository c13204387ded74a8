"""`growfx.use_kernels`: what is chosen, when it is chosen anew, and when dense kernels are taken instead."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import growfx
from growfx.errors import ConfigError
from growfx.methods.masks import collect_gradients
from growfx.runtime.train import choice, network, switch
from growfx.runtime.train import layer as layer_module
from growfx.runtime.train.library import training_status

built = pytest.mark.skipif(bool(training_status()), reason=training_status() or "the kernels are there")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROWFX_CACHE", str(tmp_path / "cache"))


class Net(nn.Module):
    def __init__(self, **geometry: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, **geometry)
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def wrapped(density: float = 0.3, **geometry: object) -> tuple[growfx.MaskedGraph, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 6, 6)
    return growfx.wrap(Net(**geometry), x[:2], density=density), x


def kernels_of(net: growfx.MaskedGraph) -> dict[str, str]:
    return {name: layer.kernel for name, layer in net.kernel_report.layers.items()}


def test_an_unknown_choice_is_refused_with_what_is_allowed() -> None:
    net, x = wrapped()
    before = net(x)
    with pytest.raises(ConfigError, match=r"`kernels` = 'sprase'.*`auto`, `dense`, `sparse`.*`sparse`\?"):
        growfx.use_kernels(net, "sprase")
    assert net.kernel_report is None
    assert torch.equal(net(x), before)


def test_a_network_without_masks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"growfx\.use_kernels expects a growfx\.MaskedGraph, got `Linear`"):
        growfx.use_kernels(nn.Linear(2, 2))


@pytest.mark.parametrize("moved", [{"dtype": torch.float64}, {"device": "meta"}])
def test_sparse_kernels_are_refused_for_other_devices_and_dtypes(moved: dict[str, object]) -> None:
    net, _ = wrapped()
    net.to(**moved)
    with pytest.raises(ConfigError, match=r"`sparse`.*`conv`"):
        growfx.use_kernels(net, "sparse")
    assert net.kernel_report is None
    growfx.use_kernels(net, "auto")
    assert set(kernels_of(net).values()) == {"dense"}


@built
@pytest.mark.parametrize(("storage", "groups"), [("dense", 4), ("dense", 2), ("present", 4)])
def test_layers_with_groups_train_with_sparse_kernels_as_with_dense_ones(storage: str, groups: int) -> None:
    net, x = wrapped(groups=groups)
    growfx.use_kernels(net, "sparse", storage=storage)
    dense, _ = wrapped(groups=groups)
    for one in (net, dense):
        optimizer = torch.optim.SGD(one.parameters(), 0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
    assert kernels_of(net) == {"conv": "sparse", "fc": "sparse"}
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@built
def test_a_second_derivative_goes_through_a_layer_with_groups() -> None:
    net, x = wrapped(groups=4)
    growfx.use_kernels(net, "sparse")
    found = []
    for one in (net, wrapped(groups=4)[0]):
        images = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(one(images).square().sum(), images, create_graph=True)
        first.square().sum().backward()
        found.append((images.grad, one.get_parameter("conv.weight").grad))
    for sparse, dense in zip(*found, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


@built
def test_dense_undoes_it() -> None:
    net, x = wrapped()
    before = net(x)
    growfx.use_kernels(net, "sparse")(x)
    assert set(kernels_of(net).values()) == {"sparse"}
    growfx.use_kernels(net, "dense")
    assert torch.equal(net(x), before)
    assert set(kernels_of(net).values()) == {"dense"}


@built
def test_a_changed_mask_is_seen_however_it_was_written() -> None:
    net, x = wrapped()
    growfx.use_kernels(net, "sparse")
    net(x)
    for write in (
        lambda mask: mask.copy_(~mask),
        lambda mask: mask.data.fill_(True),
        lambda mask: mask.numpy().__setitem__((0, 0, 0, 0), False),
    ):
        write(net.layers["conv"].mask)
        found = net(x)
        growfx.use_kernels(net, "dense")
        torch.testing.assert_close(found, net(x))
        growfx.use_kernels(net, "sparse")
        net(x)


@built
def test_changed_weights_are_seen_however_they_were_written() -> None:
    net, x = wrapped()
    growfx.use_kernels(net, "sparse")
    net(x)
    net.layers["conv"].weight.data.mul_(2)
    found = net(x)
    torch.testing.assert_close(found, growfx.use_kernels(net, "dense")(x))


@built
def test_a_step_that_collects_gradients_of_absent_edges_takes_dense_kernels() -> None:
    net, x = wrapped()
    growfx.use_kernels(net, "sparse")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    collect_gradients(net.layers.values(), True)
    net(x).square().sum().backward()
    optimizer.step()
    assert kernels_of(net) == {"conv": "dense", "fc": "dense"}
    gradient = net.layers["conv"].dense_gradient
    assert gradient is not None
    assert gradient[~net.layers["conv"].mask].any()
    collect_gradients(net.layers.values(), False)
    net(x).sum().backward()
    assert kernels_of(net) == {"conv": "sparse", "fc": "sparse"}


@built
def test_gradients_need_no_masking_after_sparse_kernels() -> None:
    net, x = wrapped()
    growfx.use_kernels(net, "sparse")
    net(x).sum().backward()
    layer = net.layers["conv"]
    assert layer.weight.grad is not None
    assert layer._stored.mark.is_of(layer.weight.grad)


@built
@pytest.mark.parametrize(("geometry", "reason"), [({"padding_mode": "reflect"}, "padding is `reflect`")])
def test_layers_without_a_sparse_kernel_stay_dense_and_say_why(geometry: dict[str, object], reason: str) -> None:
    net, x = wrapped(**geometry)
    expected = net(x)
    growfx.use_kernels(net, "sparse")
    torch.testing.assert_close(net(x), expected)
    report = net.kernel_report.layers
    assert (report["conv"].kernel, report["fc"].kernel) == ("dense", "sparse")
    assert reason in report["conv"].reason


@built
def test_each_layer_takes_what_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {4: choice.Times(100.0, 10.0, 100.0, 10.0), 2: choice.Times(10.0, 100.0, 10.0, 100.0)}
    monkeypatch.setattr(choice, "_measure", lambda layer, *_: times[layer.weight.dim()])
    net, x = wrapped()
    growfx.use_kernels(net, "auto", example_inputs=x)
    assert kernels_of(net) == {"conv": "sparse", "fc": "dense"}
    report = net.kernel_report
    assert (report.layers["conv"].dense, report.layers["conv"].sparse) == (100.0, 10.0)
    assert "conv" in str(report)
    rows = json.loads(json.dumps(report.to_json()))["layers"]
    assert rows["fc"]["kernel"] == "dense"


def test_kernels_for_the_inner_layout_are_taken_within_a_flow_alone() -> None:
    times = choice.Times(dense=1000.0, sparse=900.0, dense_inner=3000.0, sparse_inner=2500.0, panels=2000.0)
    assert (times.best(inner=False), times.best(inner=True)) == ("dense", "panels")
    assert choice.Times(1000.0, 900.0, 3000.0, 2500.0).best(inner=True) == "sparse"


def test_a_gain_smaller_than_what_a_layer_does_around_a_sparse_kernel_is_none() -> None:
    assert choice.Times(100.0, 55.0, 100.0, 55.0, 55.0).best(inner=False) == "dense"
    assert choice.Times(100.0, 55.0, 100.0, 55.0, 55.0).best(inner=True) == "dense"
    assert choice.Times(1100.0, 955.0, 1100.0, 955.0).best(inner=False) == "sparse"


class Between(nn.Module):
    """Two convolutions with norms, and a pooling that needs torch's layout, if `pools`."""

    def __init__(self, pools: bool) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.between = nn.AvgPool2d(3, 1, 1) if pools else nn.Identity()
        self.b, self.norm_b = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_b(self.b(self.between(self.norm_a(self.a(x)))))


@built
@pytest.mark.parametrize("pools", [False, True])
def test_a_flow_ends_that_turns_more_between_its_layers_than_it_gains(
    monkeypatch: pytest.MonkeyPatch, pools: bool
) -> None:
    # By its layers alone the flow takes 0.8 of the time; a turn of what a layer reads and makes takes 500 us.
    monkeypatch.setattr(choice, "_measure", lambda *_: choice.Times(1000.0, 900.0, 1500.0, 740.0))
    flows: list[object] = []
    run = network.Flow.run
    monkeypatch.setattr(network.Flow, "run", lambda self, *args: flows.append(self) or run(self, *args))
    torch.manual_seed(0)
    net, x = growfx.wrap(Between(pools), torch.randn(2, 3, 8, 8), density=0.7), torch.randn(16, 3, 8, 8)
    growfx.use_kernels(net, "auto")
    for _ in range(4):
        net(x)
    assert len(flows) == (1 if pools else 3)  # the first call measures
    assert net.kernels.chooser.turned == (16 * 8 * 64 / (16 * (3 + 8 + 8 + 8) * 64) if pools else 0)
    again = growfx.use_kernels(copy.deepcopy(net), "auto")
    again.kernels.chooser.load_state_dict(net.kernels.chooser.state_dict())
    flows.clear()
    again(x)
    assert len(flows) == (0 if pools else 1)


@built
@pytest.mark.parametrize("before", ["a smaller batch", "an old checkpoint"])
def test_what_a_flow_turns_is_compared_with_the_images_of_its_own_batch(
    monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setattr(choice, "_measure", lambda *_: choice.Times(1000.0, 900.0, 1500.0, 740.0))
    monkeypatch.setattr(choice, "_read", lambda *_: {})
    torch.manual_seed(0)
    net, x = growfx.wrap(Between(True), torch.randn(2, 3, 8, 8), density=0.7).eval(), torch.randn(16, 3, 8, 8)
    growfx.use_kernels(net, "auto")
    with torch.no_grad():
        net(x)
        net(x)
        turned = net.kernels.chooser.turned
        assert turned
        if before == "a smaller batch":
            net(x[:2])
        else:
            state = _before_turns_were_counted(net)
            net = growfx.use_kernels(copy.deepcopy(net), "auto")
            net.kernels.chooser.load_state_dict(state)
        net.kernels.chooser._flow_pays = True
        net(x)
        net.kernels.chooser._flow_pays = True
        net(x)
    assert net.kernels.chooser.turned == turned


def _before_turns_were_counted(net: growfx.MaskedGraph) -> dict[str, object]:
    """What the chooser of a release wrote that did not count turns."""
    state = net.kernels.chooser.state_dict()
    del state["turned"]
    state["known"] = [row[:-2] for row in state["known"]]
    state["last"] = {name: row[:-2] for name, row in state["last"].items()}
    return state


@built
def test_a_linear_layer_leaves_its_rows_only_to_layers_that_read_them_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense kernel reads torch's layout, and its gradient comes back in that: each activation would be turned."""
    times = {32: choice.Times(1000.0, 100.0, 1000.0, 100.0), 3: choice.Times(1000.0, 100.0, 1000.0, 100.0)}
    monkeypatch.setattr(choice, "_measure", lambda layer, *_: times[layer.out_features])
    noted: list[torch.Size] = []
    before = layer_module.note_rows
    monkeypatch.setattr(layer_module, "note_rows", lambda out: noted.append(out.shape) or before(out))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    x = torch.randn(20, 6)
    for last, left in ((100.0, 2), (2000.0, 0)):
        times[3] = choice.Times(1000.0, last, 1000.0, last)
        net = growfx.wrap(copy.deepcopy(model), x[:2], density=0.5)
        expected = net(x)
        growfx.use_kernels(net, "auto")
        assert net.kernels.plan.rows == {"0": frozenset({"2"})}
        net(x)
        noted.clear()
        for _ in range(2):
            torch.testing.assert_close(net(x), expected)
        assert noted == [torch.Size([20, 32])] * left, last


@built
def test_a_flow_that_looks_at_more_calls_than_it_gains_ends() -> None:
    chooser = choice.Chooser("auto")
    chooser.last["0"] = choice._Known(0.5, choice.Times(1000.0, 2000.0, 1000.0, 900.0), values=100)
    assert chooser.flow_pays()
    chooser.note_flow(0, 20)
    assert chooser.flow_pays()
    chooser.note_flow(0, 100)
    assert not chooser.flow_pays()
    again = choice.Chooser("auto")
    again.load_state_dict(chooser.state_dict())
    assert not again.flow_pays()


@built
def test_without_times_layers_with_groups_stay_within_a_flow_and_say_why() -> None:
    torch.manual_seed(0)
    layers = []
    for inputs, outputs, groups in ((3, 8, 1), (8, 8, 8), (8, 8, 1)):
        layers += [nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    net, x = growfx.wrap(nn.Sequential(*layers), torch.randn(2, 3, 8, 8)), torch.randn(16, 3, 8, 8)
    net.set_masks({name: torch.rand(net.layers[name].mask.shape) < 0.1 for name in ("0", "4")})
    expected = net(x)
    growfx.use_kernels(net, deterministic=True)
    assert kernels_of(net)["2"] == "dense"
    for _ in range(2):  # the first call measures
        torch.testing.assert_close(net(x), expected)
    assert kernels_of(net)["2"] == "sparse"
    assert "it has groups" in net.kernel_report.layers["2"].reason


@built
def test_what_was_chosen_before_flows_counted_their_turns_is_still_read() -> None:
    net, x = wrapped()
    growfx.use_kernels(net, example_inputs=x)
    state = _before_turns_were_counted(net)
    again = growfx.use_kernels(wrapped()[0])
    again.kernels.chooser.load_state_dict(state)
    again(x)
    assert again.kernel_report.layers == net.kernel_report.layers


@built
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_linear_layers_flow_only_where_one_of_them_is_sparse(monkeypatch: pytest.MonkeyPatch, density: float) -> None:
    """What watches each call of torch would take longer than a small dense network."""
    flows: list[object] = []
    run = network.Flow.run
    monkeypatch.setattr(network.Flow, "run", lambda self, *args: flows.append(self) or run(self, *args))
    torch.manual_seed(0)
    layers = (nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    net, x = growfx.wrap(nn.Sequential(*layers), torch.randn(2, 6), density=density), torch.randn(32, 6)
    expected = net(x)
    growfx.use_kernels(net, "auto", deterministic=True)  # by density alone
    for _ in range(3):
        torch.testing.assert_close(net(x), expected)
    assert len(flows) == (2 if density < 0.15 else 0)


@built
def test_a_layer_by_panels_gives_the_step_of_a_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_measure", lambda *_: choice.Times(500.0, 900.0, 900.0, 800.0, 100.0))
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 6, 3), nn.BatchNorm2d(6))
    net, x = growfx.wrap(nn.Sequential(*layers), torch.randn(2, 3, 8, 8), density=0.7), torch.randn(32, 3, 8, 8)
    wanted = torch.randn(32, 6, 6, 6)
    panels = growfx.use_kernels(copy.deepcopy(net), "auto")
    panels(x)  # the first call chooses
    found = panels(x)
    (found * wanted).sum().backward()
    expected = net(x)
    (expected * wanted).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert {layer.kernel for layer in panels.kernel_report.layers.values()} == {"dense"}
    assert all("batch innermost" in layer.reason for layer in panels.kernel_report.layers.values())
    for name, parameter in net.named_parameters():
        if not name.endswith("bias"):  # before a norm it has none but rounding
            gradient = panels.get_parameter(name).grad
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-3)


@built
def test_a_layer_is_looked_up_anew_when_its_density_has_changed_by_a_fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def measured(layer: growfx.MaskedGraph, *_: object) -> choice.Times:
        asked.append(layer.density)
        return choice.Times(2.0, 1.0, 2.0, 1.0)

    monkeypatch.setattr(choice, "_measure", measured)
    net, x = wrapped(1.0)
    growfx.use_kernels(net, "auto")
    layer, order = net.layers["conv"], torch.rand(net.layers["conv"].mask.shape)
    for density, times in [(0.5, 2), (0.5, 2), (0.45, 2), (0.3, 3), (0.39, 3), (0.9, 4), (0.7, 4), (0.05, 5), (0.5, 5)]:
        layer.mask.copy_(order < order.flatten().sort().values[int(density * order.numel())])
        net(x)
        assert len(asked) == times, density  # the first also asks for the linear layer; 0.39 and 0.7 are on lines


@built
def test_times_are_measured_once_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = wrapped()
    growfx.use_kernels(net, "auto", example_inputs=x)
    known = net.kernel_report.layers
    monkeypatch.setattr(choice, "_measure", lambda *_: pytest.fail("measured again"))
    again = copy.deepcopy(net)
    growfx.use_kernels(again, "auto", example_inputs=x)
    assert again.kernel_report.layers == known


@built
def test_a_batch_of_another_shape_gets_a_choice_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def measured(layer: object, geometry: object, entries: object, x: Tensor, *_: object) -> choice.Times:
        shapes.append(tuple(x.shape))
        return choice.Times(2.0, 1.0, 2.0, 1.0)

    monkeypatch.setattr(choice, "_measure", measured)
    net, x = wrapped()
    growfx.use_kernels(net, "auto")
    for images in (x, x[:5], x[:, :, :4], x):
        growfx.use_kernels(copy.deepcopy(net), "dense")
        torch.testing.assert_close(net(images), growfx.unwrap(copy.deepcopy(net)).train()(images))
    assert sum(len(shape) == 4 for shape in shapes) == 3


@built
def test_looking_at_example_inputs_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    net = growfx.wrap(model, torch.randn(2, 3, 8, 8), density=0.5)
    before, state = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
    growfx.use_kernels(net, "auto", example_inputs=torch.randn(8, 3, 8, 8, generator=torch.Generator()))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert net.kernel_report.layers["0"].dense is not None


def test_without_a_compiler_all_layers_stay_dense_and_the_report_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "training_status", lambda: "no C++ compiler: `c++` cannot be run")
    net, x = wrapped()
    expected = net(x)
    growfx.use_kernels(net, "auto", example_inputs=x)
    assert torch.equal(net(x), expected)
    assert "no C++ compiler" in str(net.kernel_report)
    assert set(kernels_of(net).values()) == {"dense"}


@built
def test_copies_and_plain_models_have_no_kernels() -> None:
    net, x = wrapped()
    growfx.use_kernels(net, "sparse")
    expected = net(x)
    again = copy.deepcopy(net)
    assert again.kernel_report is None
    torch.testing.assert_close(again(x), expected)
    plain = growfx.unwrap(again)
    assert all("kernel" not in vars(module) for module in plain.modules())


@built
def test_an_empty_layer_gives_its_bias_and_no_gradient() -> None:
    net, x = wrapped()
    net.set_masks({"conv": torch.zeros_like(net.layers["conv"].mask)})
    growfx.use_kernels(net, "auto")
    net(x).sum().backward()
    gradient = net.layers["conv"].weight.grad
    assert gradient is not None
    assert not gradient.any()


def test_times_between_two_measured_densities_are_on_their_line_and_none_are_far_from_them() -> None:
    row = {0.1: choice.Times(100.0, 20.0, 90.0, 10.0), 0.2: choice.Times(100.0, 40.0, 95.0, 30.0)}
    assert choice._between(row, 0.15) == choice.Times(100.0, pytest.approx(30.0), 90.0, pytest.approx(20.0))
    assert choice._between(row, 0.4) is None
    assert choice._between(row, 0.11) == row[0.1]
    assert choice._between({0.01: row[0.1], 0.2: row[0.2]}, 0.08) is None
    assert choice._between({0.1: row[0.1]}, 0.15) is None
    assert choice._between({}, 0.15) is None


@built
def test_a_chooser_goes_on_from_its_state_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = wrapped()
    growfx.use_kernels(net, example_inputs=x)
    torch.save(net.kernels.chooser.state_dict(), tmp_path / "state.pt")
    monkeypatch.setattr(choice, "_measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(choice, "_read", lambda *_: pytest.fail("read again"))
    again = growfx.use_kernels(wrapped()[0])
    again.kernels.chooser.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again(x)
    assert again.kernel_report.layers == net.kernel_report.layers


@built
@pytest.mark.parametrize(("density", "kernel"), [(0.1, "sparse"), (0.5, "dense")])
def test_a_deterministic_choice_is_by_density(density: float, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_measure", lambda *_: pytest.fail("measured"))
    net, x = wrapped()
    net.set_masks({name: torch.rand(layer.mask.shape) < density for name, layer in net.layers.items()})
    growfx.use_kernels(net, deterministic=True, example_inputs=x)
    assert set(kernels_of(net).values()) == {kernel}


@built
def test_a_smaller_batch_without_gradients_takes_what_a_larger_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = wrapped()
    growfx.use_kernels(net).eval()
    with torch.no_grad():
        net(x)
        taken = kernels_of(net)
        monkeypatch.setattr(choice, "_measure", lambda *_: pytest.fail("measured again"))
        net(x[:3])
    assert kernels_of(net) == taken


@built
@pytest.mark.filterwarnings("ignore")  # torch's own, about its compiler
def test_compiled_code_is_one_graph_of_dense_kernels() -> None:
    net, x = wrapped()
    growfx.use_kernels(net, "sparse")
    expected = net(x)
    found = torch.compile(net, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    gradient = net.layers["conv"].weight.grad
    assert gradient is not None
    assert not gradient[~net.layers["conv"].mask].any()


@built
def test_optimizers_clear_what_a_mask_drops_in_a_copy_too() -> None:
    found = []
    for kernels in ("dense", "sparse"):
        net = growfx.use_kernels(copy.deepcopy(wrapped()[0]), kernels)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for step in range(4):
            net(wrapped()[1]).square().sum().backward()
            for layer in net.layers.values():
                chosen = torch.rand(layer.mask.shape, generator=torch.Generator().manual_seed(step))
                layer.mask.copy_(chosen < 0.3)
            optimizer.step()
            optimizer.zero_grad()
            net.verify()
        found.append(net.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


@built
def test_a_call_in_inference_mode_leaves_nothing_that_training_cannot_use() -> None:
    net, x = wrapped()
    growfx.use_kernels(net, "sparse")
    with torch.inference_mode():
        net.eval()(x)
    net.train()(x).sum().backward()
    assert set(kernels_of(net).values()) == {"sparse"}


@built
@pytest.mark.parametrize("example", [torch.randn(2, 5, 6, 6), "x"])
def test_inputs_that_the_model_does_not_accept_leave_the_kernels_it_had(example: object) -> None:
    net, _ = wrapped()
    with pytest.raises(growfx.TraceError, match="example_inputs"):
        growfx.use_kernels(net, "sparse", example_inputs=example)
    assert net.kernel_report is None
    assert all(layer.kernel is None for layer in net.layers.values())
