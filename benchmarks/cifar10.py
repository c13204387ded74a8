"""All methods side by side on CIFAR-10 as class folders (train/ and test/), by one of four stated protocols.

`--protocol P1`: WRN-16-2, 45,000 / 5,000 / 10,000 images, 30 epochs in batches of 128, 3 seeds, densities of 5 to 30 %;
growth stops by itself. `--protocol P2`, for development: WRN-16-1, 15,000 / 5,000 / 10,000 images, 15 epochs, densities
of 5, 10 and 20 %. In both, options of methods are their defaults where `--set` does not say otherwise, sparse kernels
are chosen by time.

`--protocol gpu`: WRN-16-2 and WRN-22-2, all images, 30 epochs, 3 seeds, densities of 5, 10, 20 and 30 %, growth to the
same densities and to its own plateau, and the controls of equal cost. Hundreds of runs: choose by `--methods`,
`--models`, `--densities`, `--seeds` and `--no-controls` what there is time for.

`--protocol cpu`: a reduced one, about half an hour on two cores: 200 training images of each class, 50 others for
validation, 200 test images, WRN-16-1, 10 epochs in batches of 64 (31 steps), one seed, densities of 10 and 30 %, no
controls. Masks change every 10 steps; growth starts at 5 % and has rounds of one epoch, 1.6 times as many edges each.
Methods of several trainings are cut short: `imp` prunes 55 % a level and trains levels of 5 epochs, `continuous`
searches twice for 5 epochs, `acdc` has 3 cycles, `synflow` 20 rounds. One seed of few images tells that methods work
and what they cost; differences of a few points are noise.

    python benchmarks/cifar10.py --data cifar10/ --protocol cpu [--out runs/cifar10-cpu] [--jobs N]
        [--set pwmpr.sign_in=3 ...] [--sweep pwmpr.growth_ratio=1.3,1.6 ...]

The same command continues where it was interrupted. Figures go to `benchmarks/results/methods_<protocol>.json`, tables
in Markdown to standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grow import subset
from machine import describe
from tabulate import tabulate

from growfx import methods
from growfx.commands.compare.comparison import compare
from growfx.commands.compare.report import comparison_rows

GROWTH = ("pwmpr", "grow-prune", "gradient-growth", "random-growth")


@dataclass(frozen=True)
class Protocol:
    """What is run. `images`: of each class for train, val and test, None for all of them."""

    models: dict[str, tuple[str, tuple[str, ...]]]
    epochs: int
    seeds: tuple[int, ...]
    densities: tuple[float, ...]
    grown_to: tuple[float, ...]
    assignments: tuple[str, ...]
    method_assignments: tuple[str, ...]
    sweeps: dict[str, tuple[str, ...]]
    controls: bool
    images: dict[str, int] | None


PROTOCOLS = {
    "gpu": Protocol(
        models={"WRN-16-2": ("wide_resnet:wrn_16_2", ()), "WRN-22-2": ("wide_resnet:wrn_22_2", ())},
        epochs=30,
        seeds=(0, 1, 2),
        densities=(0.05, 0.1, 0.2, 0.3),
        grown_to=(0.05, 0.1, 0.2, 0.3, 1.0),
        assignments=("img_size=32", "workers=1"),
        method_assignments=("continuous.search_epochs=30",),
        sweeps={"continuous.initial_mask": ("-0.1", "0", "0.1")},
        controls=True,
        images=None,
    ),
    "P1": Protocol(
        models={"WRN-16-2": ("wide_resnet:wrn_16_2", ())},
        epochs=30,
        seeds=(0, 1, 2),
        densities=(0.05, 0.1, 0.2, 0.3),
        grown_to=(),
        assignments=("img_size=32",),
        method_assignments=(),
        sweeps={},
        controls=True,
        images={"train": 0, "val": 500, "test": 0},
    ),
    "P2": Protocol(
        models={"WRN-16-1": ("wide_resnet:WideResNet", ("model.depth=16", "model.k=1"))},
        epochs=15,
        seeds=(0, 1, 2),
        densities=(0.05, 0.1, 0.2),
        grown_to=(),
        assignments=("img_size=32",),
        method_assignments=(),
        sweeps={},
        controls=True,
        images={"train": 1500, "val": 500, "test": 0},
    ),
    "cpu": Protocol(
        models={"WRN-16-1": ("wide_resnet:WideResNet", ("model.depth=16", "model.k=1"))},
        epochs=10,
        seeds=(0,),
        densities=(0.1, 0.3),
        grown_to=(0.1, 0.3),
        assignments=("img_size=32", "batch_size=64", "update_every=10", "epochs_per_round=1"),
        method_assignments=(
            *(f"{name}.growth_ratio=1.6" for name in GROWTH),
            *(f"{name}.seed_density=0.05" for name in GROWTH),
            *(f"{name}.tolerance=0.01" for name in GROWTH),
            *("imp.prune_fraction=0.55", "imp.epochs=5", "imp.rewind_epochs=1"),
            *("continuous.rounds=2", "continuous.search_epochs=5", "continuous.rewind_epochs=1"),
            *("acdc.cycles=3", "synflow.rounds=20"),
        ),
        sweeps={},
        controls=False,
        images={"train": 200, "val": 50, "test": 200},
    ),
}


def chosen_methods(asked: str | None) -> tuple[str, ...]:
    """Names of the methods compared: all, but `ticket`, which needs another run's masks."""
    if asked:
        return tuple(asked.split(","))
    return ("dense", *(name for name in methods.names() if name != "ticket"))


def options_of(protocol: Protocol, names: Sequence[str]) -> dict[str, Any]:
    """Return the part of the protocol that says anything of these methods."""
    own = tuple(text for text in protocol.method_assignments if text.partition(".")[0] in names)
    fields = {key for name in names if name != "dense" for key in methods.kind_of(name).__dataclass_fields__}
    shared = tuple(
        text
        for text in protocol.assignments
        if text.partition("=")[0] in {*fields, "img_size", "batch_size", "workers"}
    )
    grown = tuple(f"{density:g}" for density in protocol.grown_to)
    sweeps = {**protocol.sweeps, **({f"{name}.max_density": grown for name in GROWTH} if grown else {})}
    return {
        "assignments": (*shared, *own),
        "sweeps": {key: values for key, values in sweeps.items() if key.partition(".")[0] in names},
    }


def slim(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's figures; of its trace what a curve needs, for growth alone."""
    kept = {key: value for key, value in run.items() if key != "trace"}
    if run["method"] in GROWTH and run["error"] is None:
        kept["trace"] = [{key: entry[key] for key in ("round", "density", "val_accuracy")} for entry in run["trace"]]
    return kept


def markdown(facts: Mapping[str, Any], densities: Sequence[float]) -> str:
    """Accuracy by method and density, then all rows with their cost."""
    split = facts["rows"][0]["split"]
    cells: dict[str, dict[float, str]] = {}
    for row in facts["rows"]:
        name, _, grown = row["label"].partition(" max_density=")
        grown, comma, control = grown.partition(",")
        asked = float(grown) if grown else row["asked_density"]
        if asked is not None and row["accuracy"] is not None:
            cells.setdefault(f"{name}{comma}{control}", {})[asked] = cell(row, shown=bool(grown))
    columns = sorted({*densities, *(density for found in cells.values() for density in found)})
    accuracy = [[name, *(found.get(density, "") for density in columns)] for name, found in cells.items()]
    dense = next((cell(row, shown=False) for row in facts["rows"] if row["label"] == "dense"), "not run")
    heads = ["method", *(f"{100 * density:g} %" for density in columns)]
    rows = [list(row.values()) for row in comparison_rows(facts["rows"])]
    head = (
        f"{split} accuracy in % (sample standard deviation over seeds), by density asked for; dense: {dense}. "
        "In square brackets the density at which growth stopped, where it is another."
    )
    return "\n\n".join(
        [
            head,
            tabulate(accuracy, heads, tablefmt="github", disable_numparse=True),
            tabulate(rows, list(comparison_rows(facts["rows"])[0]), tablefmt="github", disable_numparse=True),
        ]
    )


def cell(row: Mapping[str, Any], *, shown: bool) -> str:
    """An accuracy with its spread, and the density if `shown` and not the one asked for."""
    spread = "" if row["spread"] is None else f" ({100 * row['spread']:.2f})"
    asked = row["label"].partition("max_density=")[2].partition(",")[0]
    grown = row["density"]
    stopped = f" [{100 * grown:.1f} %]" if shown and abs(grown - float(asked)) > 1e-3 else ""
    return f"{100 * row['accuracy']:.2f}{spread}{stopped}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/ of class folders")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), required=True)
    parser.add_argument("--out", type=Path, help="default: runs/cifar10-<protocol>")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--methods", help="between commas; default: all")
    parser.add_argument("--models", help="between commas; default: those of the protocol")
    parser.add_argument("--densities", type=lambda text: tuple(float(part) for part in text.split(",")))
    parser.add_argument("--seeds", type=lambda text: tuple(int(part) for part in text.split(",")))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another option of the runs")
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=A,B", help="run every one of these values")
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/methods_<protocol>.json")
    args = parser.parse_args()
    protocol = PROTOCOLS[args.protocol]
    out = args.out or Path("runs") / f"cifar10-{args.protocol}"
    data = args.data
    if protocol.images is not None:
        data = out / "images"
        if not data.exists():
            subset(args.data, data, protocol.images, 0)
    names = chosen_methods(args.methods)
    options = options_of(protocol, names)
    sweeps = {key: tuple(values.split(",")) for key, _, values in (text.partition("=") for text in args.sweep)}
    sized = any(getattr(methods.kind_of(name), "density", None) is not None for name in names if name != "dense")
    results, status = {}, 0
    for model in args.models.split(",") if args.models else protocol.models:
        spec, arguments = protocol.models[model]
        facts = compare(
            spec,
            str(data),
            methods=names,
            densities=(args.densities or protocol.densities) if sized else (),
            seeds=args.seeds or protocol.seeds,
            epochs=args.epochs or protocol.epochs,
            assignments=(*options["assignments"], *arguments, *args.set),
            sweeps={**options["sweeps"], **sweeps},
            controls=protocol.controls and not args.no_controls,
            jobs=args.jobs,
            out=out / model,
            resume=True,
            progress=not args.quiet,
        )
        status |= bool(facts["failures"])
        results[model] = {**facts, "data": "CIFAR-10", "runs": [slim(run) for run in facts["runs"]]}
        print(f"### {model}\n\n{markdown(facts, args.densities or protocol.densities)}\n", flush=True)
        if facts["failures"]:
            print("\n".join(f"{name}: {error}" for name, error in facts["failures"].items()), file=sys.stderr)
    content = {"machine": describe(), "protocol": {"name": args.protocol, "images": protocol.images}, "models": results}
    file = args.json or Path(__file__).parent / "results" / f"methods_{args.protocol}.json"
    file.write_text(json.dumps(content, indent=1))
    return status


if __name__ == "__main__":
    sys.exit(main())
