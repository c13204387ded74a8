import runpy
from pathlib import Path

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
