"""Write the pages that say what code and measurements say: commands, methods, options, tables of results.

They go to `docs/_generated/`, which is not kept; pages of the site include them.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
_MACHINE = ("cpu", "cores", "threads", "python", "torch", "torchvision", "timm")


def write_pages(docs: Path) -> None:
    """Write all generated pages below the folder of the site."""
    folder = docs / "_generated"
    folder.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (folder / f"{name}.md").write_text(page().rstrip() + "\n", encoding="utf-8")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as a table in Markdown."""
    titles = list(rows[0])
    cells = [[str(row[title]).replace("|", "\\|").replace("\n", " ") for title in titles] for row in rows]
    lines = [f"| {' | '.join(line)} |" for line in [titles, *cells]]
    return "\n".join([lines[0], "|" + "---|" * len(titles), *lines[1:]])


def result(name: str) -> dict[str, Any]:
    """What a benchmark has kept."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def where(found: Mapping[str, Any], name: str) -> str:
    """On which machine, with which versions, and from which file."""
    machine = found["machine"]
    if isinstance(machine, str):
        machine = {"cpu": machine, **{k: v for k, v in found.items() if k in _MACHINE}}
    facts = ", ".join(f"{key} {machine[key]}" for key in _MACHINE if key in machine)
    return f"*{facts}. Raw figures: `benchmarks/results/{name}.json`.*"


# -- the code -----------------------------------------------------------------------------------------------------


def command_pages() -> str:
    """Every command with its help, as the terminal shows it at 100 columns."""
    from growfx.cli import commands

    parts = ["# Command line\n"]
    context = click.Context(commands, info_name="growfx", terminal_width=100)
    parts.append(f"```text\n{commands.get_help(context)}\n```\n")
    for name, command in sorted(commands.commands.items()):
        inner = click.Context(command, info_name=name, parent=context, terminal_width=100)
        parts.append(f"## growfx {name}\n\n```text\n{command.get_help(inner)}\n```\n")
    return "\n".join(parts)


def method_pages() -> str:
    """Every method: what it does, its options, its source."""
    import inspect

    from growfx import methods
    from growfx.commands.flags import method_rows

    parts = ["# Methods and their options\n"]
    for name in methods.names():
        kind = methods.kind_of(name)
        about = (inspect.getdoc(kind) or "").partition("\n\nAttributes:")[0]
        rows = [{k: f"`{v}`" if k in ("flag", "default") else v for k, v in row.items()} for row in method_rows(name)]
        parts.append(f"## {name}\n\n{about}\n\n{table(rows)}\n")
    return "\n".join(parts)


def option_pages() -> str:
    """The options of training and of data."""
    from growfx.commands.flags import option_texts
    from growfx.options import DataOptions, TrainOptions, describe_range

    parts = ["# Options of training and data\n"]
    for kind, title in ((TrainOptions, "Training"), (DataOptions, "Data")):
        texts = option_texts(kind)
        rows = [
            {
                "option": f"`{field.name}`",
                "default": f"`{field.default}`",
                "allowed": describe_range(field.metadata) or "any",
                "meaning": texts[field.name],
            }
            for field in dataclasses.fields(kind)
        ]
        parts.append(f"## {title}\n\n{table(rows)}\n")
    return "\n".join(parts)


# -- the measurements ---------------------------------------------------------------------------------------------


def _spread(rows: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], str]) -> dict[str, str]:
    """Columns by density."""
    return {f"{row['density']:.0%}": value(row) for row in rows}


def inference_table() -> str:
    """Speed of the sparse runtime over dense torch."""
    found = result("inference")
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for record in found["records"]:
        groups.setdefault((record["model"], record["batch"], record["threads"]), []).append(record)
    rows = []
    for (model, batch, threads), records in groups.items():
        dense = {record["variant"]: record for record in records if record["density"] is None}
        sparse = [record for record in records if record["variant"] == "sparse runtime" and record["density"]]
        rows.append(
            {
                "network": model,
                "batch": batch,
                "threads": threads,
                "dense torch": f"{1000 * dense['dense']['median']:.0f} ms",
                **{
                    other: f"{dense[other]['speedup']:.2f}" if dense.get(other, {}).get("speedup") else "-"
                    for other in ("torch.compile", "onnxruntime")
                },
                **_spread(sparse, lambda record: f"{record['speedup']:.2f}"),
            }
        )
    return f"{table(rows)}\n\n{where(found, 'inference')}"


def native_table() -> str:
    """Speed of the native runtime over the fastest dense one of the same turns: one thread, batches, two threads."""
    names = ("native_speed", "native_speed_batch16", "native_speed_threads")
    return "\n\n".join(f"{table(native_rows(result(name)))}\n\n{where(result(name), name)}" for name in names)


def native_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The networks of one file of results."""
    return [
        {
            "network": record["model"],
            "batch": record["batch"],
            "threads": record["threads"],
            "best dense": f"{record['best_peer']}, {record['milliseconds'][record['best_peer']]:.1f} ms",
            **{f"{float(density):.0%}": f"{speed:.2f}" for density, speed in record["over_best"].items()},
        }
        for record in found["found"]
    ]


def peers_table() -> str:
    """Speed over the best dense float32 runtime of the same rounds."""
    found = result("inference_peers")
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for record in found["records"]:
        row = groups.setdefault((record["model"], record["density"]), {"best": record["best_peer"]})
        row[record["variant"]] = record["over_peer"]
        if record["variant"] == record["best_peer"]:
            row["ms"] = f"{1000 * record['minimum']:.0f} ms"
    names = dict.fromkeys(record["variant"] for record in found["records"])
    rows = [
        {
            "network": model,
            "density": f"{density:.0%}",
            "best dense": f"{row['best']}, {row['ms']}",
            **{name: f"{row[name]:.2f}" if row.get(name) else "-" for name in names},
        }
        for (model, density), row in groups.items()
    ]
    return f"{table(rows)}\n\n{where(found, 'inference_peers')}"


def storage_table() -> str:
    """Bytes of ResNet-50 in every format, by density."""
    found = result("storage")
    formats: dict[str, dict[str, str]] = {}
    for row in found["rows"]:
        formats.setdefault(row["format"], {})[f"{row['density']:.0%}"] = f"{row['bytes'] / 1e6:.2f}"
    rows = [{"format": name, **sizes} for name, sizes in formats.items()]
    return f"{table(rows)}\n\n{where(found, 'storage')}"


def plateau_table() -> str:
    """How far the stop rule is from the ideal, by curve and noise."""
    found = result("plateau")
    rows = [
        {
            "curve": row["family"],
            "noise, points": f"{row['noise']:g}",
            "left behind, median": f"{row['left median']:.2f}",
            "at most 0.5 points left": f"{row['share <= 0.5']:.1%}",
            "chosen over ideal density, median": f"{row['ratio median']:.2f}",
            "ended at density, mean": f"{row['ended at']:.2f}",
        }
        for row in found["rows"]
    ]
    return f"{table(rows)}\n\n{where(found, 'plateau')}"


def step_table() -> str:
    """A masked training step and evaluation over the dense ones."""
    found = result("step")
    rows = []
    for kind in ("time", "evaluation", "memory", "updates"):
        for row in found["results"][kind]:
            model, batch, size = row["case"].split(":")
            goal = {None: "-", True: f"{row['goal']}, reached", False: f"{row['goal']}, missed"}[row["reached"]]
            rows.append(
                {
                    "measured": {"time": "training step", "updates": "update of the masks"}.get(kind, kind),
                    "network": model,
                    "batch": batch,
                    "pixels": size,
                    "variant": row["variant"],
                    "over dense": f"{row['over_dense']:.3f}",
                    "goal": goal,
                }
            )
    return f"{table(rows)}\n\n{where(found, 'step')}"


def digits_claim_table() -> str:
    """Growth on digits beside dense trainings."""
    found = result("digits_claim")
    rows = [
        {
            "comparison": run["comparison"],
            "run": f"`{run['name']}`",
            "test accuracy": f"{run['test_accuracy']:.2%}",
            "density": f"{run['density']:.2%}",
            "dense-equivalent epochs": f"{run['dense_equivalent_epochs']:.1f}",
            "epochs": run["epochs"],
        }
        for run in found["runs"]
    ]
    return f"{table(rows)}\n\n{where(found, 'digits_claim')}"


def cifar10_table() -> str:
    """Growth on a part of CIFAR-10 beside dense trainings."""
    found = result("cifar10_cpu")
    rows = [
        {
            "run": row["run"],
            "seed": row["seed"],
            "test accuracy": f"{row['test_accuracy']:.1%}",
            "density": f"{row['density']:.1%}",
            "dense-equivalent epochs": f"{row['dense_equivalent_epochs']:.1f}",
            "epochs": row["epochs"],
            "stopped by": row["stop_reason"],
        }
        for row in found["results"]
    ]
    return f"{table(rows)}\n\n{where(found, 'cifar10_cpu')}"


def train_speed_tables() -> str:
    """A training step by the fastest kernels over the dense one, on each machine that was measured."""
    return "\n\n".join(train_speed_table(name) for name in ("train_speed", "train_speed_xeon"))


def train_speed_table(name: str) -> str:
    """The cases of one file of results."""
    found = result(name)
    steps = {step for case in found["results"] for step in case["steps"]}
    densities = sorted(float(step.split()[1]) for step in steps if step.startswith("auto "))
    rows = []
    for case in found["results"]:
        model, batch, size = case["case"].split(":")
        ratios = {name: f"{step['over_dense']:.2f}" for name, step in case["steps"].items()}
        masked = {name: ratio for name, ratio in ratios.items() if name.startswith("masked ")}
        rows.append(
            {
                "network": model,
                "batch": batch,
                "pixels": size,
                "dense": f"{case['dense_ms']:.0f} ms",
                "dense bfloat16": ratios.get("bf16", "-"),
                "masked, dense kernels": f"{min(masked.values())} to {max(masked.values())}" if masked else "-",
                **{f"{density:.0%}": ratios.get(f"auto {density:g}", "-") for density in densities},
            }
        )
    return f"{table(rows)}\n\n{where(found, name)}"


def included_table() -> str:
    """The networks that come with growfx."""
    found = result("included")
    rows = [
        {
            "name": f"`growfx:{row['name']}`",
            "test accuracy": f"{row['test_accuracy']:.1%}",
            "density": f"{row['density']:.1%}",
            "weights": f"{row['nnz']:,}",
            "bytes": f"{row['bytes']:,}",
            "cost": f"{row['dense_equivalent_epochs']:.1f} dense epochs",
            "made by": f"`{row['command']}`",
        }
        for row in found["networks"]
    ]
    return f"{table(rows)}\n\n{where(found, 'included')}"


PAGES = {
    "cli": command_pages,
    "methods": method_pages,
    "options": option_pages,
    "included": included_table,
    "inference": inference_table,
    "native": native_table,
    "peers": peers_table,
    "storage": storage_table,
    "plateau": plateau_table,
    "step": step_table,
    "digits_claim": digits_claim_table,
    "cifar10": cifar10_table,
    "train_speed": train_speed_tables,
}
