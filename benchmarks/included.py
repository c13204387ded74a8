"""Train the networks that come with growfx (`growfx.load("growfx:NAME")`), and write their artifacts and cards.

    python benchmarks/included.py --cifar10 cifar10 --json benchmarks/results/included.json

Every network is made by one command, which the JSON keeps with the result; figures on the card are those of the run.
CIFAR-10 is a folder with train/ and test/ of class folders, as for `benchmarks/cifar10.py`; without it, the networks on
digits are made.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe

from growfx.commands.job import reopen
from growfx.deploy.saving import save
from growfx.reporting.run import provenance

FOLDER = Path(__file__).parent.parent / "growfx" / "artifact" / "included-networks"
MOST_BYTES = 300_000
LICENSE = "apache-2.0"
_NARROW = "--set 'model.channels=(16,32,64,128)' --batch-size 32 --lr 0.05"
_NARROW_STEM = "--set 'model.channels=(32,64,128,256)' --set model.stem_type=deep --set model.stem_width=8"
CIFAR10 = "cifar10-"  # what the names of networks on CIFAR-10 begin with
# Digits are enlarged to 32 pixels, images of CIFAR-10 to 48: the network halves them twice before its first block.
NETWORKS = {
    "digits-resnet10t-grown": f"grow resnet10t {_NARROW} --epochs 12 --seed-density 0.002 --growth-ratio 1.6 "
    "--epochs-per-round 4 --tolerance 0.005",
    "digits-resnet10t-rigl": f"train resnet10t {_NARROW} --method rigl --density 0.02 --update-every 20 --epochs 12",
    "digits-efficientnet-gmp": "train test_efficientnet --method gmp --density 0.1 --batch-size 32 --lr 0.05 "
    "--epochs 15 --img-size 32",
    "cifar10-resnet10t-grown": f"grow resnet10t {_NARROW_STEM} --img-size 48 --epochs 12 --seed-density 0.006 "
    "--growth-ratio 1.6 --seed-epochs 4 --epochs-per-round 1 --tolerance 0.01 --max-density 0.05 --workers 1",
}


def train(name: str, data: str, runs: Path) -> list[str]:
    """Train one network in a folder of `runs`, or go on with it; returns the words of the command."""
    kernels = ["--kernels", "auto", "--deterministic"] if name.startswith(CIFAR10) else ["--kernels", "dense"]
    words = [*shlex.split(NETWORKS[name]), "--data", data, "--seed", "0", *kernels]
    print("$ growfx", shlex.join(words), flush=True)
    command = [sys.executable, "-m", "growfx", *words, "--out", str(runs / name), "--quiet", "--resume"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return ["growfx", *words]


def keep(name: str, runs: Path, words: list[str]) -> dict[str, Any]:
    """Write the artifact of a network that was trained; returns what the JSON keeps of it."""
    net, folder = reopen(runs / name)
    result = folder.read_json("result.json")
    if result is None:
        sys.exit(f"{runs / name} has no result")
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    info = save(net, FOLDER / name, provenance={**provenance(folder, result), "license": LICENSE})
    size = sum(file.stat().st_size for file in (FOLDER / name).iterdir())
    if size > MOST_BYTES:
        sys.exit(f"{name} takes {size} bytes; allowed are {MOST_BYTES}")
    print(f"{name}: {result['test_accuracy']:.2%} at {info.density:.2%}, {size} bytes", flush=True)
    kept = {k: v for k, v in result.items() if k not in ("kernels", "trace")}
    return {"name": name, "command": shlex.join(words), "bytes": size, **kept}


def main() -> None:
    """Make all of them, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NETWORKS)}  [default: all there is data for]")
    parser.add_argument("--cifar10", metavar="FOLDER", help="CIFAR-10 as class folders; the card names it like this")
    parser.add_argument("--json", type=Path, help="keep the results here, beside those of other networks")
    parser.add_argument("--runs", type=Path, help="folder of the runs; what is there is continued")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = arguments.runs or Path(folder)
        for name in arguments.names or NETWORKS:
            data = arguments.cifar10 if name.startswith(CIFAR10) else "digits"
            if data is None and not arguments.names:
                continue
            if data is None:
                parser.error(f"`{name}` needs --cifar10")
            row = keep(name, runs, train(name, data, runs))
            if arguments.json:
                write(arguments.json, row)


def write(file: Path, row: dict[str, Any]) -> None:
    """Put the result of one network among those of the others; one of another machine says which."""
    before = json.loads(file.read_text()) if file.exists() else {}
    here = describe()
    machine = before.get("machine", here)
    row = row if machine == here else {**row, "machine": here}
    made = {other["name"]: other for other in before.get("networks", [])} | {row["name"]: row}
    rows = [made[name] for name in NETWORKS if name in made]
    file.write_text(json.dumps({"machine": machine, "networks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
