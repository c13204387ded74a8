"""The folder of a run: `config.json`, `log.jsonl`, `checkpoint/`, `result.json`, `curve.png`, `summary.txt`,
`artifact/`, and `tensorboard/` where asked for.

`config.json` says what the run is; continuing it with other options is refused by the name of the first one
that differs.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from growfx.errors import CheckpointError, ConfigError
from growfx.options import DataOptions, TrainOptions, as_json
from growfx.runs.checkpoint import Checkpoints
from growfx.runs.lock import LOCK_NAME, RunLock

__all__ = ["RunFolder", "finite", "refuse_existing"]

# In the order in which a run is replaced: were that broken off, the rest is still a run, not one that has finished.
_CONTENT = (
    "result.json",
    "checkpoint",
    "artifact",
    "curve.png",
    "summary.txt",
    "tensorboard",
    "log.jsonl",
    "config.json",
)
# What may differ between the start of a run and its continuation: where it runs, where its data lies, who looks on, and
# what it keeps.
_FREE = {
    "versions",
    "train.device",
    "train.tensorboard",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "data.spec",
    "weights_from.name",
    "data.data_dir",
    "data.download",
    "data.workers",
    "data.cache_mb",
}
# What a run that was killed before it had written `config.json` may leave.
_UNBEGUN = {LOCK_NAME, "config.json.new", ".writable"}


def refuse_existing(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may be written to `path`, before anything costly is done; leaves nothing behind.

    Raises:
        ConfigError: both `resume` and `overwrite`.
        CheckpointError: a run is there and neither is given, the folder holds something else, or it cannot be
            written.
    """
    if resume and overwrite:
        raise ConfigError("`resume` and `overwrite` exclude each other: continue the run, or replace it")
    try:
        present = sorted({p.name for p in path.iterdir()} - _UNBEGUN) if path.exists() else []
    except OSError as error:
        raise CheckpointError(f"run folder `{path}` cannot be used ({error.strerror})") from error
    if present and "config.json" not in present:
        raise CheckpointError(
            f"`{path}` is not a run folder (it holds `{present[0]}` and no `config.json`); choose another folder"
        )
    if present and not (resume or overwrite):
        raise CheckpointError(
            f"run folder `{path}` exists; continue it with `--resume`, replace it with `--overwrite` "
            "(in Python `resume=True`, `overwrite=True`), or choose another folder"
        )
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
        with suppress(OSError):  # another run may have started in a folder above this one
            for folder in missing:
                folder.rmdir()
    except OSError as error:
        raise CheckpointError(f"run folder `{path}` cannot be written ({error.strerror})") from error


class RunFolder:
    """One run on disk. Opened by `start`; the log is kept in step with the checkpoint.

    Attributes:
        path: the folder.
        config: what `config.json` holds.
        defaults: nested as `config`: what an option stood for before it existed, beside those of training and data.
        checkpoints: the run's checkpoints.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.config = dict(config)
        self.defaults = dict(defaults or {})
        self.checkpoints = Checkpoints(path / "checkpoint", config.get("train", {}).get("keep_checkpoints", 2))
        self._lock = RunLock(path)

    @classmethod
    def start(
        cls,
        path: Path,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        defaults: Mapping[str, Any] | None = None,
    ) -> "RunFolder":
        """Create the folder, or open it again, for this process alone until `close`.

        Args:
            config: nested dictionaries of JSON values that say what the run is.
            defaults: nested in the same way, the defaults of options that a run started earlier may not know; those of
                training and data need not be given.

        Raises:
            CheckpointError: as `refuse_existing`, another process works on the run, or with `resume` the run there was
                made with other options.
        """
        refuse_existing(path, resume=resume, overwrite=overwrite)
        folder = cls(path, config, defaults)
        path.mkdir(parents=True, exist_ok=True)
        folder.hold()
        try:
            if resume and (path / "config.json").exists():
                folder.require_same(cls.open(path).config, f"run folder `{path}`")
                return folder
            for name in _CONTENT:
                target = path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            folder.write_json("config.json", config)
        except BaseException:
            folder.close()
            raise
        return folder

    def hold(self) -> None:
        """Keep other processes out of the folder, which is there, until `close`; CheckpointError when one is in it."""
        self._lock.acquire()

    def close(self) -> None:
        """Let other processes continue or replace the run."""
        self._lock.release()

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Read an existing run folder; CheckpointError when it is not one."""
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            if not isinstance(config, dict) or "train" not in config:
                above = path.absolute().parent
                hint = f"; the run is `{above}`" if (above / "config.json").is_file() else ""
                raise ValueError(f"it does not describe a run{hint}")
        except FileNotFoundError as error:
            raise CheckpointError(f"`{path}` is not a run folder: it has no `config.json`") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"`{path / 'config.json'}` cannot be read ({error})") from error
        return cls(path, config)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one JSON file, whole or not at all."""
        self.write_text(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write one text file, whole or not at all; CheckpointError when that fails."""
        new = self.path / (name + ".new")
        try:
            with new.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            new.replace(self.path / name)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise CheckpointError(f"`{self.path / name}` cannot be written ({error.strerror})") from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of one JSON file, None when it is not there yet."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"`{self.path / name}` cannot be read ({error})") from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to `log.jsonl`; it is on disk before a checkpoint that counts on it."""
        try:
            with (self.path / "log.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(finite(record), allow_nan=False) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise CheckpointError(f"`{self.path / 'log.jsonl'}` cannot be written ({error.strerror})") from error

    def log_position(self) -> int:
        """Length of `log.jsonl` in bytes."""
        path = self.path / "log.jsonl"
        return path.stat().st_size if path.exists() else 0

    def rewind_log(self, position: int) -> None:
        """Drop the records written after a checkpoint that is about to be continued, and a last line cut short."""
        path = self.path / "log.jsonl"
        if not path.exists():
            return
        with path.open("r+b") as stream:
            kept = stream.read(position)
            stream.truncate(kept.rfind(b"\n") + 1)

    def read_log(self) -> list[dict[str, Any]]:
        """All whole records of `log.jsonl`; one that is being written, or was cut short, is left out."""
        path = self.path / "log.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def require_same(self, recorded: Mapping[str, Any], where: str) -> None:
        """Raise `CheckpointError` unless `recorded`, the config that `where` was started with, is this run's.

        An option that is newer than `recorded` had its default then, and before ranks were counted there was one.
        """
        one = {"ranks": 1}
        # A checkpoint has tuples where `config.json` has lists.
        before, now = (one | _flat(json.loads(json.dumps(config))) for config in (recorded, self.config))
        defaults = _defaults() | _flat(json.loads(json.dumps(self.defaults)))
        before = {**{k: v for k, v in defaults.items() if k in now}, **before}
        for key in sorted(before.keys() | now.keys(), key=_importance):
            if key in _FREE or key.startswith("versions."):
                continue
            if before.get(key) != now.get(key):
                raise CheckpointError(
                    f"{where} was started with `{key}` = {before.get(key)!r}, now it is {now.get(key)!r}; continue "
                    "with the same options, or start a new run in another folder"
                )


def _defaults() -> dict[str, Any]:
    return _flat({"train": as_json(TrainOptions()), "data": as_json(DataOptions())})


def _importance(key: str) -> tuple[int, str]:
    """Another model or method differs in much that follows from it: their names come first, then their arguments."""
    first = ("model.name", "model.", "method.name", "method.")
    return next((i for i, prefix in enumerate(first) if key.startswith(prefix)), len(first)), key


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def finite(value: Any) -> Any:
    """A copy that JSON can hold: inf and nan become None."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    return float(value) if math.isfinite(value) else None
