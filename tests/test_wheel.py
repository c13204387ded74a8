"""The wheel is whole, and works in an environment that has nothing else of growfx."""

import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT


@pytest.mark.slow
def test_the_wheel_has_every_file_and_does_what_a_new_user_does_first(tmp_path: Path) -> None:
    pytest.importorskip("build")
    if not (ROOT / ".git").exists():
        pytest.skip("the wheel is built from what git tracks, and this is not a clone")
    command = [sys.executable, str(ROOT / ".github" / "wheel.py"), "--out", str(tmp_path), "--same-libraries"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing missing" in done.stdout
    assert list(tmp_path.glob("growfx-*.tar.gz"))
