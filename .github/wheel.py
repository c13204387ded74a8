"""Build source archive and wheel, install the wheel into an empty environment, and use it there as a new user would.

    python .github/wheel.py [--out dist] [--same-libraries]

The build starts from a copy of the files that git tracks, so that nothing lying about gets in. The new environment has
pip alone; libraries come from the package index, or with `--same-libraries` from the environment that runs this script,
without a download. Ends with an error when a file is missing from the wheel, or a step fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What a user does first. Each is a command of the installed package, in a folder far from the sources.
GROW = """growfx grow test_resnet --data digits --epochs 1 --img-size 16 --seed-density 0.05 --max-density 0.1
    --growth-ratio 2 --epochs-per-round 1 --lr 0.05 --kernels dense --out run --quiet"""
STEPS = [
    "growfx --version",
    GROW,
    "growfx eval run/artifact --data digits",
    "growfx inspect run/artifact",
    "growfx report run --out run.html",
    "growfx eval growfx:digits-resnet10t-grown --data digits",
]
CODE = """
import torch, growfx
from growfx.runtime import kernel_build
model = growfx.load("run/artifact", runtime="sparse")
print(model(torch.randn(1, 3, 16, 16)).shape, kernel_build.kernel_status() or "kernels compiled")
assert growfx.passes.PASSES and kernel_build.SOURCE.is_file() and all(file.is_file() for file in kernel_build.HEADERS)
assert "site-packages" in growfx.__file__, growfx.__file__
"""


def build(out: Path, *, same_libraries: bool) -> Path:
    """Build both archives from what git tracks; returns the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "growfx"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            source, target = ROOT / name, copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                target.symlink_to(source.readlink())
            elif source.is_file():
                shutil.copy2(source, target)
        command = [sys.executable, "-m", "build", "--outdir", str(out.resolve())]
        command += ["--no-isolation"] if same_libraries else []
        subprocess.run(command, cwd=copy, check=True, stdout=subprocess.DEVNULL)
    return max(out.glob("growfx-*.whl"), key=lambda file: file.stat().st_mtime)


def missing(wheel: Path) -> set[str]:
    """Files of the packages that git tracks and the wheel lacks."""
    tracked = subprocess.run(
        ["git", "ls-files", "growfx", "passes"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    wanted = {f"growfx/{name}" if name.startswith("passes/") else name for name in tracked} - {"growfx/passes"}
    return wanted - set(zipfile.ZipFile(wheel).namelist())


def use(wheel: Path, *, same_libraries: bool) -> None:
    """Install the wheel into an empty environment and take every step."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        venv.create(place / "env", with_pip=True)
        python = place / "env" / "bin" / "python"
        install = [str(python), "-m", "pip", "install", "--quiet", f"growfx[demo,kernel] @ {wheel.resolve().as_uri()}"]
        if same_libraries:
            install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
            theirs = subprocess.run(
                [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout.strip()
            # Read after the environment's own, and no hooks of editable installations among them.
            (Path(theirs) / "libraries.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
        subprocess.run(install, check=True)
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        for step in [
            [str(python.parent / word) if i == 0 else word for i, word in enumerate(s.split())] for s in STEPS
        ]:
            run(step, place, variables)
        run([str(python), "-c", CODE], place, variables)


def run(command: list[str], folder: Path, variables: dict[str, str]) -> None:
    """Run one step, and say how long it took."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=variables, check=True, stdout=subprocess.DEVNULL)
    shown = " ".join(Path(word).name if i == 0 else word for i, word in enumerate(command))
    print(f"{time.perf_counter() - started:6.1f} s  {shown.strip().splitlines()[0]}", flush=True)


def main() -> None:
    """Build, look into the wheel, and use it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--same-libraries", action="store_true")
    arguments = parser.parse_args()
    wheel = build(arguments.out, same_libraries=arguments.same_libraries)
    lost = missing(wheel)
    if lost:
        sys.exit(f"{wheel.name} lacks {len(lost)} files: {', '.join(sorted(lost)[:10])}")
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, nothing missing")
    use(wheel, same_libraries=arguments.same_libraries)


if __name__ == "__main__":
    main()
