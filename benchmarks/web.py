"""Pages of sparse networks in a headless Chromium: milliseconds of a run, bytes of the page.

Random weights under random ERK masks, one image, one thread, WebAssembly with SIMD. What is told is the least of many
runs by the browser's clock, networks taking turns. A density of 1 is the same runtime with dense kernels.

    python benchmarks/web.py [--models resnet50 ...] [--densities 0.1 ...] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from inference import build
from machine import describe
from tabulate import tabulate

import growfx

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from browser import Page, browser_or_skip, browser_page

MODELS = ("resnet50", "mobilenetv3_large_100", "vit_small_patch16_224", "resnet18")
DENSITIES = (0.05, 0.1, 1.0)
RUNS = 5
RESULTS = Path(__file__).parent / "results" / "web.json"
RUN = """[...Array(RUNS)].map(
    () => network.run(noise(form.channels * form.height * form.width)).milliseconds)""".replace("RUNS", str(RUNS))


def measured(page: Page, file: Path) -> list[float]:
    """Milliseconds of some runs in a newly opened page; the page itself has compared outputs with torch's."""
    page.open(file)
    told = page.value("document.getElementById('alarm').innerText")
    if page.value("document.documentElement.dataset.state") != "ready" or told:
        sys.exit(f"{file}: {told}")
    return page.value(RUN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    version = subprocess.run(
        [browser_or_skip(), "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder, browser_page(Path(folder) / "profile") as page:
        made: dict[tuple[str, float], growfx.deploy.web.WebExport] = {}
        for model in args.models:
            for density in args.densities:
                made[model, density] = growfx.export_web(build(model, density), Path(folder) / f"{model}-{density}")
        times: dict[tuple[str, float], list[float]] = {key: [] for key in made}
        for _ in range(args.rounds):
            for key, web in made.items():
                times[key] += measured(page, web.page)
    records: list[dict[str, Any]] = [
        {
            "model": model,
            "density": density,
            "milliseconds": min(times[model, density]),
            "runs": len(times[model, density]),
            "network_bytes": web.network_bytes,
            "page_bytes": web.bytes,
        }
        for (model, density), web in made.items()
    ]
    args.json.write_text(
        json.dumps({"machine": describe() | {"browser": version}, "records": records}, indent=1) + "\n"
    )
    print(tabulate(records, headers="keys", tablefmt="github", floatfmt=".4g"))


if __name__ == "__main__":
    main()
