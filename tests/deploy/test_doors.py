import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifact_nets import Tied, make_net, plain, same_bits
from torch import nn

import growfx
from growfx.deploy.native.export import prepared_network
from growfx.errors import ArtifactError, ConfigError, GrowfxError, MaskError, TraceError
from growfx.masked.doors import as_masked_graph, is_masked_graph
from growfx.selection.choose import draw, top
from growfx.selection.edge_keys import EdgeKeys

WRONG: dict[str, tuple[Callable[[growfx.MaskedGraph], Any], type[GrowfxError], str]] = {
    "a number as a model's name": (lambda net: growfx.create_model(3), ConfigError, "`int`"),
    "a module as a model's name": (lambda net: growfx.create_model(nn.Linear(2, 2)), ConfigError, "growfx.wrap"),
    "no model's name": (lambda net: growfx.create_model(""), ConfigError, "unknown"),
    "a number as an artifact": (lambda net: growfx.load(3), ArtifactError, "path, got 3"),
    "nothing as an artifact": (lambda net: growfx.load(None), ArtifactError, "path, got None"),
    "bytes as an artifact": (lambda net: growfx.inspect(b"x"), ArtifactError, "path"),
    "a path without a name": (lambda net: growfx.inspect(""), ArtifactError, "path"),
    "a path that no system has": (lambda net: growfx.inspect("a\0b"), ArtifactError, "path"),
    "a number to inspect": (lambda net: growfx.inspect(3), ArtifactError, "path, got 3"),
    "a number to numpy": (lambda net: growfx.to_numpy(3), ArtifactError, "path, got 3"),
    "a number to scipy": (lambda net: growfx.to_scipy(3), ArtifactError, "path, got 3"),
    "a class as an instance": (lambda net: growfx.load("x", model=Tied), ArtifactError, "`model=` expects"),
    "a net as an instance": (lambda net: growfx.load("x", model=net), ArtifactError, "growfx.unwrap"),
    "a number as a folder": (lambda net: growfx.save(net, 3), ArtifactError, "path, got 3"),
    "a model to save": (lambda net: growfx.save(Tied(), "x"), ArtifactError, "`Tied`; make one with growfx.wrap"),
    "a number to save": (lambda net: growfx.save(3, "x"), ArtifactError, "`int`"),
    "a number to save compactly": (lambda net: growfx.save(3, "x", compact=True), ArtifactError, "`int`"),
    "a number as provenance": (lambda net: growfx.save(net, "x", provenance=3), ArtifactError, "`int`"),
    "a list as provenance of a page": (
        lambda net: growfx.export_web(net, "x", provenance=[1]),
        ArtifactError,
        "`list`",
    ),
    "a number to export": (lambda net: growfx.export_onnx(3, "x.onnx"), ConfigError, "`int`"),
    "a model to train": (lambda net: growfx.train(Tied(), [], []), ConfigError, "`Tied`; make one with growfx.wrap"),
    "a name as a method": (lambda net: growfx.train(net, [], [], method="rigl"), ConfigError, 'create("rigl"'),
    "a wrong name as a method": (lambda net: growfx.train(net, [], [], method="x"), ConfigError, "names()"),
    "a class as a method": (
        lambda net: growfx.train(net, [], [], method=growfx.methods.kind_of("rigl")),
        ConfigError,
        'create("rigl"',
    ),
    "a number as names to plan without": (
        lambda net: growfx.plan_channels(net, "flops=0.5", exclude=3),
        ConfigError,
        "`exclude` is 3",
    ),
    "a number as floors of a plan": (
        lambda net: growfx.plan_channels(net, "flops=0.5", floors=3),
        ConfigError,
        "`floors` 3",
    ),
    "a text as a size": (lambda net: growfx.load("x", max_bytes="1"), ArtifactError, "`max_bytes` is '1'"),
    "a list as a method's name": (lambda net: growfx.methods.create(["rigl"]), ConfigError, "unknown"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_type_gets_the_error_of_its_door_and_leaves_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, kind, text = WRONG[case]
    with pytest.raises(kind) as caught:
        call(make_net(0.3))
    assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


def _attach(net: growfx.MaskedGraph, name: str) -> None:
    method: Any = growfx.methods.create(name)
    method.attach(net, torch.optim.SGD(net.parameters(), 0.1), total_steps=4, steps_per_epoch=2)


NEED_VALUES: dict[str, tuple[Callable[[growfx.MaskedGraph], Any], type[GrowfxError]]] = {
    "save": (lambda net: growfx.save(net, "out"), ArtifactError),
    "save compactly": (lambda net: growfx.save(net, "out", compact=True), GrowfxError),
    "unwrap compactly": (lambda net: growfx.unwrap(net, compact=True), TraceError),
    "attach": (lambda net: _attach(net, "rigl"), ConfigError),
    "attach growth": (lambda net: _attach(net, "pwmpr"), ConfigError),
    "native": (lambda net: growfx.export_native(net, "native"), ConfigError),
    "native of a module": (lambda net: growfx.export_native(net.shell, "native"), ConfigError),
    "digest": (lambda net: net.mask_digest(), MaskError),
    "verify": (lambda net: net.verify(), MaskError),
    "masks": (lambda net: net.set_masks({"0": torch.ones(3, 4, dtype=torch.bool)}), MaskError),
    "plan": (lambda net: growfx.plan_channels(net, "flops=0.5"), TraceError),
}


@pytest.mark.parametrize("case", NEED_VALUES)
def test_a_network_without_values_is_refused_where_they_are_needed(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        net = growfx.wrap(model, torch.randn(1, 4))
    call, kind = NEED_VALUES[case]
    with pytest.raises(kind, match="meta"):
        call(net)
    assert not list(tmp_path.iterdir())


def test_random_masks_of_a_model_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        with pytest.raises(ConfigError, match="meta device, where masks have no values; wrap it at density 1"):
            growfx.wrap(model, torch.randn(1, 4), density=0.5)
        net = growfx.wrap(model, torch.randn(1, 4))
    filled = growfx.wrap(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(1, 4), density=0.5)
    net.load_state_dict(filled.state_dict(), assign=True)
    assert net.mask_digest() == filled.mask_digest()
    x = torch.randn(5, 4)
    assert torch.equal(net.eval()(x), filled.eval()(x))


def test_a_choice_among_no_edges_is_empty() -> None:
    for choose in (draw, top):
        chosen = choose({}, 1, EdgeKeys(0, "none"))
        assert (chosen.masks, chosen.count) == ({}, 0)


def test_a_compiled_network_is_saved_as_what_it_was_compiled_from(tmp_path: Path) -> None:
    net = make_net(0.3)
    compiled: Any = torch.compile(net, backend="eager")
    for wrapped in (compiled, nn.DataParallel(net), nn.DataParallel(compiled)):
        assert is_masked_graph(wrapped)
        assert as_masked_graph(wrapped, "growfx.save") is net
    growfx.save(compiled, tmp_path / "out")
    growfx.save(compiled, tmp_path / "small", compact=True)
    assert same_bits(growfx.load(tmp_path / "out", model=Tied()), plain(net))
    assert not is_masked_graph(torch.compile(Tied(), backend="eager"))


@pytest.mark.parametrize("name", ["rigl", "random-growth"])
def test_a_method_attaches_to_the_network_that_was_compiled(name: str) -> None:
    net = make_net(1.0)
    method: Any = growfx.methods.create(name)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    method.attach(torch.compile(net, backend="eager"), optimizer, total_steps=10, steps_per_epoch=5)
    assert net.density < 1
    with pytest.raises(ConfigError, match=rf"method `{name}` expects a growfx.MaskedGraph, got `Tied`"):
        method.attach(Tied(), optimizer, total_steps=10, steps_per_epoch=5)


def test_each_door_has_its_own_class_of_error() -> None:
    for door, kind in (("growfx.save", ArtifactError), ("growfx.unwrap", TraceError), ("growfx.train", ConfigError)):
        with pytest.raises(kind, match=f"{door} expects"):
            as_masked_graph(np.float64(1), door)


EXPORTS: dict[str, Callable[..., Any]] = {"native": growfx.export_native, "web": growfx.export_web}
if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
    EXPORTS["onnx"] = growfx.export_onnx


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_says_what_to_give_in_place_of_an_artifact_of_an_unknown_model(name: str, tmp_path: Path) -> None:
    growfx.save(make_net(0.3), tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"give growfx\.export_.* what `growfx\.load\(path, model=inst"):
        EXPORTS[name](tmp_path / "out", tmp_path / "exported")


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_refuses_inputs_without_values(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="meta device"):
        EXPORTS[name](make_net(0.3), tmp_path / "exported", example_inputs=torch.empty(1, 3, 6, 6, device="meta"))
    assert not list(tmp_path.iterdir())


class Rotated(nn.Module):
    """A layer whose outputs are scaled by the magnitudes of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.turn = nn.Parameter(torch.tensor([3 + 4j, 1j, -2j]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.turn.abs()


def test_casts_to_a_floating_type_leave_complex_numbers_complex(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    net = growfx.wrap(Rotated(), x, density=0.5).eval()
    growfx.save(net, tmp_path / "out")
    wide = growfx.load(tmp_path / "out", model=Rotated(), dtype=torch.float64)
    assert torch.allclose(wide(x.double()).float(), net(x))
    sparse = growfx.load(tmp_path / "out", model=Rotated(), runtime="sparse", example_inputs=x)
    assert torch.allclose(sparse(x), net(x))
    model, _, inputs = prepared_network(net, None, "growfx.export_native")
    assert torch.allclose(model(x[:1]), net(x[:1]))
    assert inputs.args[0].dtype is torch.float32


def test_weights_stay_channels_last_in_what_is_loaded_or_cut(tmp_path: Path) -> None:
    last: Any = torch.channels_last

    def build() -> Any:
        layers = [nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 2)]
        return nn.Sequential(*layers).to(memory_format=last)

    net = growfx.wrap(build(), torch.randn(2, 3, 6, 6)).eval()
    net.layers["0"].mask[:3] = False
    growfx.save(net, tmp_path / "out")
    growfx.save(net, tmp_path / "small", compact=True)
    loaded = [growfx.load(tmp_path / name, model=build()) for name in ("out", "small")]
    for model, width in zip([growfx.unwrap(net, compact=True), *loaded], [5, 8, 5], strict=True):
        assert model[2].weight.shape[1] == width
        assert all(model[i].weight.is_contiguous(memory_format=last) for i in (0, 2))
        assert not model[2].weight.is_contiguous()
