"""The networks that come with growfx."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from places import ROOT

import growfx
from growfx.artifact.hub import included_names, local_path
from growfx.commands import inspection
from growfx.commands.inspection import accuracy_of
from growfx.data.sources import DataSource, open_data

KEPT = json.loads((ROOT / "benchmarks" / "results" / "included.json").read_text())
ROWS = {row["name"]: row for row in KEPT["networks"]}


def test_there_are_a_few_and_each_is_one_of_the_script() -> None:
    assert 3 <= len(included_names()) <= 8
    assert included_names() == sorted(ROWS)


@pytest.mark.parametrize("name", included_names())
def test_a_network_is_small_loads_and_has_the_accuracy_of_its_card(name: str) -> None:
    folder = local_path(f"growfx:{name}")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 300_000
    model = growfx.load(f"growfx:{name}")
    assert not any(type(module).__module__.startswith("growfx") for module in model.modules())
    info = growfx.inspect(f"growfx:{name}")
    assert model(torch.randn(2, *info.provenance["input"]["input_size"])).shape == (2, 10)
    data = name.partition("-")[0]
    if data == "digits":  # the only data that come with a library
        found = accuracy_of(f"growfx:{name}", data, "test")
        assert found["accuracy"] == pytest.approx(ROWS[name]["test_accuracy"], abs=1.5 / found["images"])
    assert (info.nnz, info.numel) == (ROWS[name]["nnz"], ROWS[name]["numel"])
    card = (folder / "README.md").read_text()
    assert f"| test accuracy | {ROWS[name]['test_accuracy']:.2%} |" in card
    assert "license: apache-2.0" in card
    assert f"| data | `{data}` |" in card
    assert f"| density of the masked layers | {info.density:.4%} (" in card
    assert f"| cost of training | {ROWS[name]['dense_equivalent_epochs']:.2f} dense-equivalent epochs |" in card


def test_one_is_of_real_images_and_says_how_growth_ended() -> None:
    (row,) = (row for name, row in ROWS.items() if name.startswith("cifar10-"))
    info = growfx.inspect(f"growfx:{row['name']}")
    assert info.provenance["result"]["stop_reason"] == row["stop_reason"]
    assert info.provenance["data"]["classes"] == CLASSES
    assert info.density <= 0.1


CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_an_unknown_name_is_answered_by_the_list() -> None:
    with pytest.raises(growfx.ArtifactError) as caught:
        growfx.load("growfx:digits-resnet10t-growm")
    assert all(f"`growfx:{name}`" in str(caught.value) for name in included_names())
    assert "did you mean `digits-resnet10t-grown`?" in str(caught.value)
    for name in ("", "../included", "digits-resnet10t-grown/config.json"):
        with pytest.raises(growfx.ArtifactError, match="comes with growfx"):
            growfx.load(f"growfx:{name}")


def test_an_evaluation_reads_each_image_once_and_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        for digit in range(10):
            (tmp_path / split / str(digit)).mkdir(parents=True)
            Image.new("L", (8, 8), digit).save(tmp_path / split / str(digit) / "0.png")
    sources: list[DataSource] = []
    monkeypatch.setattr(inspection, "open_data", lambda *given: sources.append(open_data(*given)) or sources[-1])
    name = next(name for name in included_names() if name.startswith("digits"))
    assert accuracy_of(Path(f"growfx:{name}"), str(tmp_path), "val")["images"] == 10
    kept = [split.images.kept._images for source in sources for split in source.splits.values()]
    assert kept == [{}, {}]
