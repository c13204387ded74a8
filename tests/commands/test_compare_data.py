"""A comparison is of one data set, wherever it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from error_facts import facts
from PIL import Image

from growfx.commands.compare.comparison import Comparison, _open
from growfx.errors import CheckpointError


def write_folder(root: Path, images: int) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                Image.new("L", (8, 8), 20 * i).save(root / split / name / f"{i}.png")
    return root


def opened(out: Path, data: Path, *, resume: bool, **options: object) -> None:
    comparison = Comparison("test_resnet", str(data), ("dense",), assignments=("img_size=16",), **options)
    _open(out, comparison, resume=resume, overwrite=False).close()


def test_a_comparison_is_not_continued_on_other_data(tmp_path):
    first, other = write_folder(tmp_path / "first", 4), write_folder(tmp_path / "other", 5)
    opened(tmp_path / "out", first, resume=False)
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=facts(f"`{first}`", f"`{other}`", "same data")):
        opened(tmp_path / "out", other, resume=True)
    assert (tmp_path / "out" / "config.json").read_bytes() == before


def test_a_comparison_goes_on_where_its_data_has_moved(tmp_path):
    first = write_folder(tmp_path / "first", 4)
    opened(tmp_path / "out", first, resume=False)
    opened(tmp_path / "out", shutil.move(first, tmp_path / "moved"), resume=True, seeds=(0, 1))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["seeds"] == [0, 1]


def test_a_comparison_goes_on_with_other_memory_for_images(tmp_path):
    data = write_folder(tmp_path / "data", 4)
    opened(tmp_path / "out", data, resume=False)
    comparison = Comparison("test_resnet", str(data), ("dense",), assignments=("img_size=16", "cache_mb=0"))
    _open(tmp_path / "out", comparison, resume=True, overwrite=False).close()


def test_a_comparison_from_before_data_was_noted_is_continued(tmp_path):
    first = write_folder(tmp_path / "first", 4)
    opened(tmp_path / "out", first, resume=False)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    del config["data"]
    path.write_text(json.dumps(config))
    opened(tmp_path / "out", first, resume=True)
    assert json.loads(path.read_text())["data"]["spec"] == str(first)
