import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import growfx

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_plain_loop_grows_and_saves(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "plain_loop.py"))["main"]
    accuracy = main(out=str(tmp_path / "out"), growth_epochs=4, final_epochs=1)
    shown = capsys.readouterr().out
    assert "growth: still going" in shown
    assert f"accuracy {accuracy:.4f}" in shown
    info = growfx.inspect(tmp_path / "out")
    assert 0.05 < info.density < 0.1
    assert str(info.nnz) in shown


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's folders leave that to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_loop_of_timm_trains_a_sparse_network_by_all_of_timms_recipe(tmp_path, capsys):
    noise = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for name, colour in (("blue", 2), ("red", 0)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                pixels[..., colour] += 127
                Image.fromarray(pixels).save(folder / f"{number}.png")
    arguments = (
        "--model test_resnet --img-size 32 --epochs 8 --warmup-epochs 1 --batch-size 8 --workers 0 --density 0.3"
    )
    more = f"--opt adamw --lr 0.01 --model-ema-decay 0.9 --out {tmp_path / 'out'}"
    main = runpy.run_path(str(EXAMPLES / "timm_loop.py"))["main"]
    top1 = main([str(tmp_path / "data"), *arguments.split(), *more.split()])
    assert top1 > 80
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert f"top-1 {top1:.2f} %, density 0.3" in lines[-2]
    info = growfx.inspect(tmp_path / "out")
    assert info.density == pytest.approx(0.3, abs=1e-3)
    assert str(info.nnz) in lines[-1]
    assert growfx.load(tmp_path / "out")(torch.randn(1, 3, 32, 32)).shape == (1, 2)
