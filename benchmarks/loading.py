"""Processor time of reading an epoch of images from a folder, without and with decoded images kept in memory.

    python benchmarks/loading.py --data FOLDER [--img-size 32] [--epochs 3] [--out FILE]

FOLDER has train/ and val/ or test/ of class folders. The loaders are those of `growfx train`: training images cropped
and flipped at random, validation images as they are. One process, one thread; the first epoch with `cache_mb` decodes
and keeps, so the least of the later ones is given.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe
from torch import nn

from growfx.data.loaders import fit_input, make_loader
from growfx.data.sources import open_data
from growfx.options import DataOptions


def seconds(folder: str, options: DataOptions, epochs: int) -> dict[str, Any]:
    """Processor seconds of an epoch of training and of validation images."""
    source = open_data(folder, options)
    form = fit_input(source, nn.Identity(), options)
    found: dict[str, Any] = {"cache_mb": options.cache_mb}
    for split in ("train", "val"):
        loader = make_loader(source, split, form, options, train=split == "train")
        times: list[float] = []
        for _ in range(epochs + 1):
            begun = time.process_time()
            for _batch in loader:
                pass
            times.append(time.process_time() - begun)
        found[split] = {"images": len(source.splits[split]), "first": times[0], "later": min(times[1:])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loading.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        seconds(options.data, DataOptions(img_size=options.img_size, cache_mb=megabytes), options.epochs)
        for megabytes in (0, 512)
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    facts = {**describe(), "clock": "processor time of one thread"}
    options.out.write_text(json.dumps({"machine": facts, "found": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
