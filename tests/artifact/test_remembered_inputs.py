import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import growfx
from growfx.artifact.input_specs import InputSpec
from growfx.artifact.remembered_inputs import default_inputs, inputs_from, specs_of
from growfx.commands.bench.subject import opened_subject
from growfx.commands.inspection import facts_of
from growfx.errors import ArtifactError, ConfigError, TraceError
from growfx.recorded.inputs import Inputs

CACHE = "GROWFX_CACHE"


class Small(nn.Module):
    """A network of images of 24 x 20 pixels in two channels, which takes no others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, stride=2), nn.Linear(4 * 11 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().flatten(1))


class Words(nn.Module):
    """A network of word numbers, a mask and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, kept: Tensor, scale: float = 1.0) -> Tensor:
        return self.second((self.first(self.words(ids)) * kept.unsqueeze(-1)).relu().mean(1)) * scale


WORDS = (torch.randint(0, 11, (4, 7)), torch.ones(4, 7, dtype=torch.bool), 2.0)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    growfx.save(growfx.wrap(Small(), torch.rand(5, 2, 24, 20), density=0.2), tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def words(tmp_path: Path) -> Path:
    growfx.save(growfx.wrap(Words(), WORDS, density=0.2), tmp_path / "words")
    return tmp_path / "words"


def test_an_artifact_tells_shapes_and_dtypes_of_its_example_inputs(images: Path, words: Path) -> None:
    assert growfx.inspect(images).inputs == (InputSpec(None, "F32", (1, 2, 24, 20)),)
    assert growfx.inspect(words).inputs == (
        InputSpec(None, "I64", (1, 7)),
        InputSpec(None, "BOOL", (1, 7)),
        InputSpec(None, value=2.0),
    )
    assert growfx.inspect(images).to_dict()["inputs"] == [{"dtype": "F32", "keyword": None, "shape": [1, 2, 24, 20]}]


def test_a_loaded_network_is_wrapped_on_the_inputs_it_was_saved_with(images: Path) -> None:
    model = growfx.load(images, model=Small())
    assert not any("growfx" in name for name in model.state_dict())
    net = growfx.wrap(model)
    assert net.example_inputs()[0].shape == (1, 2, 24, 20)
    assert growfx.wrap(copy.deepcopy(model)).example_inputs()[0].shape == (1, 2, 24, 20)


def test_default_inputs_are_as_remembered_and_the_same_each_time(words: Path) -> None:
    model = growfx.load(words, model=Words(), dtype=torch.bfloat16)
    ids, kept, scale = default_inputs(model).args
    assert (ids.dtype, kept.dtype, scale) == (torch.int64, torch.bool, 2.0)
    assert (ids.shape, kept.shape) == ((1, 7), (1, 7))
    assert model(ids, kept, scale).isfinite().all()
    specs = (InputSpec(None, "F32", (2, 3)), InputSpec("scale", "F64", ()))
    first, second = inputs_from(specs), inputs_from(specs)
    assert torch.equal(first.args[0], second.args[0])
    assert first.kwargs["scale"].dtype == torch.float64
    assert specs_of(first) == specs


def test_inputs_that_no_file_can_hold_are_not_remembered() -> None:
    for value in ([torch.rand(2)], {"x": torch.rand(2)}, object(), float("nan"), "x" * 1000):
        assert specs_of(Inputs((value,), {})) is None
    assert specs_of(Inputs((), {})) is None
    assert default_inputs(nn.Linear(2, 2)) is None


def test_the_sparse_runtime_starts_from_them(images: Path, words: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    network: Any = growfx.load(images, model=Small(), runtime="sparse")
    assert network.lowering.inputs == ((1, 2, 24, 20),)
    x = torch.rand(3, 2, 24, 20)
    torch.testing.assert_close(network(x), growfx.load(images, model=Small())(x), rtol=1e-3, atol=1e-4)
    network = growfx.load(words, model=Words(), runtime="sparse")
    assert network.lowering.inputs == ((1, 7), (1, 7))


def test_the_sparse_runtime_names_its_own_argument_where_the_inputs_do_not_fit(images: Path) -> None:
    with pytest.raises(TraceError, match=r"`example_inputs` of `growfx\.load`"):
        growfx.load(images, model=Small(), runtime="sparse", example_inputs=torch.rand(1, 7))


def test_bench_starts_from_them(images: Path, words: Path) -> None:
    with opened_subject(images, model=Small()) as subject:
        assert subject.inputs(3, torch.float32).args[0].shape == (3, 2, 24, 20)
    with opened_subject(words, model=Words()) as subject:
        ids, kept, scale = subject.inputs(2, torch.float32).args
        assert subject.load()(ids, kept, scale).shape == (2, 3)
        assert subject.masked()(ids, kept, scale).shape == (2, 3)


def test_inspect_counts_alive_units_on_them(tmp_path: Path) -> None:
    model = growfx.create_model("test_resnet", num_classes=3, in_chans=1)
    growfx.save(growfx.wrap(model, torch.rand(1, 1, 40, 24), density=0.3), tmp_path / "out")
    facts = facts_of(str(tmp_path / "out"))
    assert "alive_note" not in facts
    assert growfx.wrap(growfx.load(tmp_path / "out")).example_inputs()[0].shape == (1, 1, 40, 24)


def test_onnx_files_start_from_them(images: Path, words: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from growfx.commands.bench.peers import OnnxSession

    model = growfx.load(words, model=Words())
    growfx.export_onnx(model, tmp_path / "words.onnx")
    ids, kept = torch.randint(0, 11, (5, 7)), torch.rand(5, 7) < 0.5
    found = OnnxSession(tmp_path / "words.onnx", 1)(ids, kept)
    torch.testing.assert_close(found, model(ids, kept, 2.0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ArtifactError, match="model="):
        growfx.export_onnx(images, tmp_path / "images.onnx")


def test_images_of_another_kind_are_refused_where_images_are_needed(tmp_path: Path) -> None:
    from growfx.errors import DataError
    from growfx.models.build import default_image_shape

    growfx.save(growfx.wrap(nn.Sequential(nn.Linear(4, 3)), torch.rand(2, 4)), tmp_path / "out")
    model = growfx.load(tmp_path / "out", model=nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(DataError, match=r"\(1, 4\); expected images"):
        default_image_shape(model)
    assert growfx.wrap(model).example_inputs()[0].shape == (1, 4)
    with (
        pytest.raises(ConfigError, match="`img_size` is for networks that take one batch of images"),
        opened_subject(tmp_path / "out", model=nn.Sequential(nn.Linear(4, 3)), img_size=32),
    ):
        pass
