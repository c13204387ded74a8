"""The kernels compiled for other processors than this one: the same results as torch's dense kernels."""

import subprocess
import sys
from pathlib import Path

import pytest

from growfx.runtime.kernel_build import NATIVE
from growfx.runtime.train.library import training_status

TESTS = Path(__file__).parent
CODE = """
import sys
import pytest
from growfx.runtime import kernel_build
kernel_build.NATIVE = sys.argv[1]
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""
AVX2 = "-march=x86-64-v3"  # AVX2 and FMA, nothing of AVX-512


def flags() -> set[str]:
    """What this processor can do, as far as Linux says."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


@pytest.mark.slow
@pytest.mark.skipif(bool(training_status()), reason=training_status() or "the kernels are there")
@pytest.mark.skipif(not {"avx2", "fma"} <= flags(), reason="this processor has no AVX2")
def test_kernels_for_avx2_pass_the_tests_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    files = [str(TESTS / name) for name in ("test_products.py", "test_library.py")]
    run = subprocess.run([sys.executable, "-c", CODE, AVX2, *files], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-1000:]
    assert set(run.stdout.split()[0]) == {"."}  # none was skipped
    (build,) = tmp_path.glob("growfx_training_*/build.ninja")
    assert AVX2 in build.read_text()
    assert NATIVE not in build.read_text()
