"""`growfx.export_native`: what is written, and what is refused with nothing written."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from native_nets import Classifier, Function, relative_error
from torch import Tensor, nn

import growfx
from growfx.deploy.native.export import native_plan
from growfx.errors import ArtifactError, ConfigError, TraceError, UnsupportedOperatorError
from growfx.passes.lower.plan.file import network_bytes
from growfx.runtime.native.library import NativeNetwork, compile_library
from growfx.runtime.native.sources import SOURCE_FOLDER


def classifier(density: float = 0.3) -> growfx.MaskedGraph:
    return growfx.wrap(Classifier(), torch.randn(1, 3, 16, 16), density=density).eval()


def test_a_folder_has_the_network_the_sources_and_an_example_and_no_python(tmp_path: Path) -> None:
    made = growfx.export_native(classifier(), tmp_path / "a" / "out")
    names = {file.name for file in made.path.iterdir()}
    assert {"network.gfx", "growfx.h", "example.c", "CMakeLists.txt", "README.md"} < names
    assert {file.name for file in SOURCE_FOLDER.glob("*.cpp")} < names
    assert not [name for name in names if name.endswith(".py")]
    assert made.bytes == (made.path / "network.gfx").stat().st_size
    assert (made.inputs, made.outputs) == (("batch x 3 x 16 x 16",), ("batch x 5",))
    assert "batch x 3 x 16 x 16" in (made.path / "README.md").read_text()


def test_an_artifact_a_masked_graph_and_a_plain_module_give_the_same_outputs(tmp_path: Path) -> None:
    net = classifier()
    growfx.save(net, tmp_path / "artifact")
    x = torch.randn(5, 3, 16, 16)
    plain = growfx.unwrap(net).eval()
    with torch.no_grad():
        expected = plain(x)
    assert relative_error(NativeNetwork(network_bytes(native_plan(net)))(x)[0], expected) < 1e-5
    assert relative_error(NativeNetwork(network_bytes(native_plan(plain, x[:1])))(x)[0], expected) < 1e-5


@pytest.mark.slow
def test_the_network_file_is_as_small_as_the_artifact(tmp_path: Path) -> None:
    model = growfx.create_model("resnet18", num_classes=10)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    for density in (0.02, 0.5):
        net = growfx.wrap(copy.deepcopy(model), torch.randn(1, 3, 64, 64), density=density).eval()
        info = growfx.save(net, tmp_path / f"{density}")
        made = growfx.export_native(tmp_path / f"{density}", tmp_path / f"native{density}")
        assert made.bytes < 1.05 * info.bytes
        assert made.folded == 2 * 20  # a factor and a summand for each norm
    x = torch.randn(2, 3, 64, 64)
    got = NativeNetwork((tmp_path / "native0.5" / "network.gfx").read_bytes())(x)[0]
    with torch.no_grad():
        assert relative_error(got, growfx.load(tmp_path / "0.5")(x)) < 1e-4


def test_neither_the_network_nor_the_module_given_is_changed(tmp_path: Path) -> None:
    net = classifier()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    growfx.export_native(net, tmp_path / "out")
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_folder_with_something_in_it_and_a_file_are_refused_and_an_empty_folder_is_filled(tmp_path: Path) -> None:
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    empty.mkdir()
    (full / "mine").write_text("kept")
    file.write_text("kept")
    for target, words in ((full, "not empty"), (file, "is a file"), ("", "expects a path"), (file / "in", "cannot be")):
        with pytest.raises(ArtifactError, match=words):
            growfx.export_native(classifier(), target)
    assert [x.name for x in full.iterdir()] == ["mine"]
    growfx.export_native(classifier(), empty)
    assert (empty / "network.gfx").is_file()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_operators_without_a_kernel_are_all_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = Function(lambda x: torch.cumprod(torch.fft.fft(x).real, 1).sort(1)[0])
    with pytest.raises(UnsupportedOperatorError, match=r"aten\._fft_r2c.*") as caught:
        growfx.export_native(model, tmp_path / "out", example_inputs=torch.randn(1, 4))
    assert "aten._fft" in str(caught.value)
    assert not list(tmp_path.iterdir())


def _branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (_branch, "reads a number from data"),
        (lambda x: x.relu() if x.shape[0] < 3 else x, "another batch size"),
        (lambda x: x.sum(0, keepdim=True) + x, "over the batch"),
    ],
)
def test_what_depends_on_data_or_mixes_rows_is_refused(function: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=words):
        growfx.export_native(Function(function), tmp_path / "out", example_inputs=torch.randn(1, 4))
    assert not list(tmp_path.iterdir())


def test_something_else_than_a_network_and_integer_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expects .*, got `int`"):
        growfx.export_native(7, tmp_path / "out")
    with pytest.raises(ArtifactError, match="nowhere"):
        growfx.export_native(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(TraceError, match="float tensors"):
        growfx.export_native(nn.Embedding(5, 3), tmp_path / "out", example_inputs=torch.tensor([[1]]))


@pytest.mark.parametrize("shape", [(1, 5), (2, 3, 4, 4)])
def test_example_inputs_on_which_the_network_fails_are_refused_and_nothing_is_written(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 6))
    with pytest.raises(growfx.TraceError, match="fails on its example inputs"):
        growfx.export_native(net, tmp_path / "out", example_inputs=torch.zeros(shape))
    assert not (tmp_path / "out").exists()


def test_several_inputs_and_outputs_keep_their_order(tmp_path: Path) -> None:
    model = Function(lambda x, y: {"sum": x + y[:, :, None], "rest": [y * 2, F.relu(x)]})
    x, y = torch.randn(3, 4, 5), torch.randn(3, 4)
    net = NativeNetwork(network_bytes(native_plan(model, (x[:1], y[:1]))))
    for got, expected in zip(net(x, y), (x + y[:, :, None], y * 2, x.relu()), strict=True):
        assert torch.equal(got, expected)


def test_a_compiler_that_fails_or_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for compiler, words in (("/nowhere/c++", "cannot be run"), ("false", "compiling failed")):
        monkeypatch.setenv("CXX", compiler)
        assert words in compile_library(tmp_path / "lib.so")
    assert not list(tmp_path.iterdir())
