"""Small networks: without dead units and with norms folded, stored, loaded, refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_nets import forge
from breadth import some
from compact_nets import awake, sparse_net
from places import GOLDEN
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import growfx
from growfx.artifact import reader as artifact_reader
from growfx.deploy import saving as export
from growfx.deploy.saving import save_small, small_network
from growfx.errors import ArtifactError, TraceError
from growfx.passes.fold_norm import fold_norm

FOLDED = GOLDEN / "artifact-1.1-folded"


def act(channels: int) -> nn.Module:
    """A norm that contains an activation with a parameter."""
    return BatchNormAct2d(channels, act_layer=nn.PReLU, inplace=False)


def small() -> nn.Module:
    """Norms behind a convolution without a bias, behind one with one, and behind no layer."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        act(6),
        nn.Conv2d(6, 6, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 2, 1),
    )


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small_net() -> growfx.MaskedGraph:
    torch.manual_seed(3)
    return sparse_net(awake(small()), IMAGE, 0.7, 0.4, 2)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_norms_leave_with_the_units_and_the_artifact_loads_without_them(tmp_path: Path) -> None:
    net = small_net()
    with torch.inference_mode():
        made = small_network(net)
    assert made.folded == {"1": "0", "3": "2"}
    assert made.kept == {"5": "no convolution or linear layer stands right before it"}
    assert made.units.removed
    assert str(made).splitlines()[-2:-1] == ["5 stays: no convolution or linear layer stands right before it"]
    assert "2 batch norms folded into the layers before them; largest error" in str(made)
    info = save_small(net, made, tmp_path / "out")
    assert info == growfx.save(net, tmp_path / "again", compact=True)
    instance = growfx.load(tmp_path / "out", model=small())
    assert isinstance(instance[1], nn.PReLU)
    assert isinstance(instance[3], nn.Identity)
    assert isinstance(instance[5], nn.BatchNorm2d)
    with torch.no_grad():
        close(instance(IMAGE), net(IMAGE))
    assert info.nnz == sum(int(layer.mask.sum()) for layer in made.net.layers.values())
    again = growfx.wrap(instance, IMAGE)
    again.set_masks(artifact_reader.load_masks(tmp_path / "out"))
    assert not small_network(again).folded


@pytest.mark.slow
@pytest.mark.parametrize("name", some(["test_resnet", "test_efficientnet"], lambda name: name == "test_resnet"))
def test_folded_models_of_the_zoo_load_by_name(tmp_path: Path, name: str) -> None:
    model: Any = awake(growfx.create_model(name, num_classes=5))
    x = torch.randn(2, 3, 48, 48)
    net = sparse_net(model, x, 0.3, 0.2)
    made = small_network(net)
    save_small(net, made, tmp_path / "out")
    loaded = growfx.load(tmp_path / "out")
    assert type(loaded) is type(model)
    count = lambda m: sum(isinstance(n, nn.BatchNorm2d) for n in m.modules())  # noqa: E731
    assert count(loaded) == count(model) - len(made.folded) < count(model)
    with torch.no_grad():
        close(loaded(x), net(x))
        program = torch.export.export(loaded, (x,))
        assert torch.equal(program.module()(x), loaded(x))
        assert loaded(x).dtype == torch.float32
        half = growfx.load(tmp_path / "out", dtype=torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16


def test_a_network_in_few_digits_keeps_its_norms(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval().bfloat16()
    net = growfx.wrap(model, IMAGE.bfloat16())
    assert fold_norm(net).kept == {"1": "its factors would be rounded to the torch.bfloat16 of `0`"}
    assert growfx.save(net, tmp_path / "out", compact=True).version == "1.2"


def test_norms_that_cannot_be_folded_stay_and_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(net: growfx.MaskedGraph) -> None:
        raise TraceError("it computes something else")

    monkeypatch.setattr(export, "fold_norm", refuse)
    net = small_net()
    made = small_network(net)
    assert made.to_json()["norms_kept"] == {"every norm": "it computes something else"}
    assert "every norm stays: it computes something else" in str(made)
    save_small(net, made, tmp_path / "out")
    with torch.no_grad():
        close(growfx.load(tmp_path / "out", model=small())(IMAGE), net(IMAGE))


def test_the_golden_folded_artifact_of_version_1_1_reads_for_ever() -> None:
    expected = load_file(FOLDED / "expected.safetensors")
    model = growfx.load(FOLDED, model=small())
    x = expected.pop("input")
    with torch.no_grad():
        close(model(x), expected.pop("output"))
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def write_golden(folder: Path) -> None:
    """How the golden artifact was made; the files in the repository are never written again."""
    net = small_net()
    made = small_network(net)
    save_small(net, made, folder, provenance={"note": "golden"})
    with torch.no_grad():
        output = net(IMAGE)
    state = growfx.unwrap(made.net).state_dict()
    save_file({**state, "input": IMAGE, "output": output}, folder / "expected.safetensors")


HOSTILE: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda m: m.update(requires=["compaction"]), "fields `compaction` and `requires` do not agree"),
    (lambda m: m["compaction"].pop("norms"), "fields `compaction` and `requires` do not agree"),
    (lambda m: m["compaction"].update(norms="1"), "`norms` is not a list of names"),
    (lambda m: m["compaction"].update(norms=[1]), "`norms` is not a list of names"),
    (lambda m: m["compaction"].update(norms=["1", "1"]), "`norms` has a name twice"),
    (lambda m: m["compaction"].update(biases=["0", "0"]), "`biases` has a name twice"),
    (lambda m: m["compaction"].update(norms=["9"]), "the model has no module `9`"),
    (lambda m: m["compaction"].update(norms=[""]), "the model has no module ``"),
    (lambda m: m["compaction"].update(norms=["2"]), "`2` cannot be folded away: a Conv2d is not a batch norm"),
    (lambda m: m["compaction"].update(norms=["1.act"]), "`1.act` cannot be folded away: a PReLU is not a batch norm"),
    (lambda m: m["compaction"].update(norms=["1"]), "the artifact lacks `3.bias`"),
    (lambda m: m["compaction"].update(norms=["1", "3", "5"]), "`5` cannot be folded away: it is made smaller"),
]


@pytest.mark.parametrize("case", range(len(HOSTILE)))
def test_a_hostile_plan_for_norms_is_refused_and_the_instance_stays_as_it_was(tmp_path: Path, case: int) -> None:
    edit, text = HOSTILE[case]
    file = tmp_path / "sparse.safetensors"
    shutil.copy(FOLDED / file.name, file)
    forge(file, edit)
    model = small()
    before = dict(model.named_modules())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=text):
        growfx.load(file, model=model)
    assert dict(model.named_modules()) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


class Called(nn.Module):
    """Takes a keyword only, and multiplies by a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 12)
        self.w = nn.Parameter(torch.randn(12, 3))

    def forward(self, *, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return (self.second(self.first(x).relu()).relu() @ self.w) * scale


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_compact_artifact_of_a_model_called_by_keywords_has_all_its_masks(tmp_path: Path, scale: float) -> None:
    torch.manual_seed(0)
    named = {"x": torch.randn(2, 8), "scale": scale}
    net = growfx.wrap(Called(), ((), named), density=0.1, masked=["w"]).eval()
    info = growfx.save(net, tmp_path / "out", compact=True)
    loaded = growfx.load(tmp_path / "out", model=Called())
    torch.testing.assert_close(loaded(**named), net(**named))
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in net.parameters())
    assert {layer.name for layer in info.layers} == {"first", "second", "w"}
    assert info.nnz <= net.nnz
