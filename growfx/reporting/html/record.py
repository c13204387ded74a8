"""Read what there is of a run, however damaged: what cannot be read is named, the rest is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from growfx.artifact.info import ArtifactInfo
from growfx.errors import ConfigError, GrowfxError

__all__ = ["RunRecord", "find_runs", "mapping", "number", "read_run", "text"]

_RUN_FILES: Final = ("log.jsonl", "result.json", "checkpoint")
# What a record of the log must have and may have to be drawn: numbers.
_NEEDED: Final = {"epoch": ("epoch", "density"), "round": ("round", "density")}
_LARGEST: Final = 1e100  # what is measured of a run is far below
_FRACTIONS: Final = ("density", "val_accuracy", "raw_accuracy", "cost", "budget_density")
_OPTIONAL: Final = (
    "train_loss",
    "lr",
    "dense_equivalent_epochs",
    "seconds",
    "steps",
    "nnz",
    "noise",
    "dead_units",
    "off_path",
)


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    Attributes:
        config, result: the contents of `config.json` and `result.json`; empty where missing or damaged.
        epochs, rounds: the records of the log, in its order, those that can be drawn.
        artifact: the contents of `artifact/`, None where it is missing or damaged.
        problems: what could not be read, a sentence each.
    """

    path: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    epochs: Sequence[Mapping[str, Any]]
    rounds: Sequence[Mapping[str, Any]]
    artifact: ArtifactInfo | None
    problems: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def model(self) -> str:
        """The name of the model, "-" where it is not known."""
        return text(self.result.get("model")) or text(mapping(self.config.get("model")).get("name")) or "-"

    @property
    def method(self) -> str:
        """The name of the method; "dense" where all weights are trained, "-" where it is not known."""
        own = text(self.result.get("method")) or text(mapping(self.config.get("method")).get("name"))
        return own or ("dense" if self.config else "-")

    @property
    def data(self) -> str:
        """The spec of the data, "-" where it is not known."""
        return text(mapping(self.config.get("data")).get("spec")) or "-"

    @property
    def same_data(self) -> str:
        """A text that is equal for runs of the same images and classes."""
        data = mapping(self.config.get("data"))
        return json.dumps([data.get("fingerprint") or self.data, data.get("classes")], default=str)

    @property
    def accuracy(self) -> tuple[float | None, float | None]:
        """Accuracies (fractions) on the validation and the test images, None where not measured."""
        return number(self.result.get("val_accuracy")), number(self.result.get("test_accuracy"))

    def figure(self, name: str) -> float | None:
        """A number of the result; None where it is not there or not a finite number."""
        return number(self.result.get(name))


def number(value: object) -> float | None:
    """The value if it is a finite number that can be drawn, else None."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return value if abs(value) < _LARGEST else None  # nor is NaN


def text(value: object) -> str:
    """The value if it is a text, else ""."""
    return value if isinstance(value, str) else ""


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among `paths` and in the folders of comparisons among them, each once.

    Raises:
        ConfigError: a path is neither.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for run in _runs_at(path):
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_at(path: Path) -> list[Path]:
    try:
        if _is_run(path):
            return [path]
        inside = sorted(run for run in (path / "runs").iterdir() if _is_run(run)) if (path / "runs").is_dir() else []
        above = path.absolute().parent if path.exists() and _is_run(path.absolute().parent) else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"`{path}` cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if inside:
        return inside
    why = "it does not exist" if not path.exists() else "it has no `config.json` of a run, no log and no result"
    hint = f"; the run is `{above}`" if above else ""
    raise ConfigError(
        f"expected the folder of a run or of a comparison, got `{path}`: {why}{hint}; give a folder that `growfx grow`,"
        " `growfx train` or `growfx compare` wrote"
    )


def _is_run(path: Path) -> bool:
    """Whether a folder has the config of a run, or files that only runs have."""
    if not path.is_dir():
        return False
    if any((path / name).exists() for name in _RUN_FILES):
        return True
    return "train" in _read_json(path / "config.json", [])


def read_run(path: Path) -> RunRecord:
    """Read a run folder; what is damaged or missing is named in `problems`."""
    problems: list[str] = []
    config = _read_json(path / "config.json", problems)
    result = _read_json(path / "result.json", problems, required=False)
    epochs, rounds = _read_log(path / "log.jsonl", problems)
    if not rounds:  # the trace of growth has the same facts
        trace = [mapping(entry) for entry in result.get("trace") or []] if _is_list(result.get("trace")) else []
        checked = [_checked({**entry, "event": "round"}) for entry in trace if "noise" in entry]
        rounds = [record for record, fault in checked if not fault]
    if not result and not any("result.json" in problem for problem in problems):
        problems.append("there is no `result.json`: the run has not ended")
    return RunRecord(
        path, config, result, epochs, rounds, _read_artifact(path, problems, bool(result)), tuple(problems)
    )


def _read_json(path: Path, problems: list[str], *, required: bool = True) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.extend([f"`{path.name}` is missing"] if required else [])
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"`{path.name}` cannot be read ({' '.join(str(error).split())})")
        return {}
    if isinstance(content, dict):
        return content
    problems.append(f"`{path.name}` holds a {type(content).__name__}, not a dictionary")
    return {}


def _read_artifact(path: Path, problems: list[str], ended: bool) -> ArtifactInfo | None:
    from growfx.artifact import reader

    folder = path / "artifact"
    if not folder.exists():
        problems.extend(["there is no `artifact`: it was removed"] if ended else [])
        return None
    try:
        return reader.inspect(folder)
    except GrowfxError as error:
        problems.append(f"`artifact` cannot be read ({error})")
        return None


def _read_log(path: Path, problems: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    kept: dict[str, list[dict[str, Any]]] = {"epoch": [], "round": []}
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        problems.append("`log.jsonl` is missing")
        return [], []
    except OSError as error:
        problems.append(f"`log.jsonl` cannot be read ({error.strerror})")
        return [], []
    last = len(lines)
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record, fault = _record(line)
        if fault and place == last:
            problems.append(f"`log.jsonl`, line {place}: cut short, or being written")
        elif fault:
            problems.append(f"`log.jsonl`, line {place}: {fault}")
        elif record["event"] in kept:
            kept[record["event"]].append(record)
    return kept["epoch"], kept["round"]


def _record(line: str) -> tuple[dict[str, Any], str]:
    """Return a record of the log and "", or nothing and what is wrong with it."""
    try:
        return _checked(json.loads(line))
    except (ValueError, RecursionError):
        return {}, "not JSON"


def _checked(record: Any) -> tuple[dict[str, Any], str]:
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return {}, "not a record of an event"
    needed = _NEEDED.get(record["event"], ())
    for name in needed:
        if number(record.get(name)) is None:
            return {}, f"`{name}` is {record.get(name)!r:.60}, expected a number"
    for name in (*_FRACTIONS, *_OPTIONAL) if needed else ():
        value = number(record.get(name))
        if record.get(name) is not None and value is None:
            return {}, f"`{name}` is {record[name]!r:.60}, expected a number"
        if value is not None and name in _FRACTIONS and not 0.0 <= value <= 1.0:
            return {}, f"`{name}` is {value:.6g}, expected a fraction from 0 to 1"
    if record["event"] == "round":
        record["cohorts"] = _list_where(record.get("cohorts"), _is_cohort)
        densities = mapping(record.get("layer_density")).items()
        record["layer_density"] = {name: value for name, value in densities if number(value) is not None}
        record["fit"] = mapping(record.get("fit")) or None
    return record, ""


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _list_where(value: object, fits: Callable[[Any], bool]) -> list[Any]:
    """The value if it is a list of which every member fits, else an empty one."""
    return value if isinstance(value, list) and all(map(fits, value)) else []


def _is_cohort(value: object) -> bool:
    entry = mapping(value)
    whole = all(type(entry.get(key)) is int and 0 <= entry[key] < 2**63 for key in ("born", "edges"))
    shares = [entry.get(key, "") for key in ("survival", "gradient_share")]
    known = all(share is None or number(share) is not None for share in shares)
    return whole and known and number(entry.get("magnitude")) is not None
