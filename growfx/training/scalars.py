"""Write the scalars of a run for TensorBoard, beside its log: what `log.jsonl` records, over optimizer steps."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growfx.errors import ConfigError

__all__ = ["FOLDER", "Scalars"]

FOLDER = "tensorboard"  # in the run folder

# Tag by key of a record; what a record does not have, or has no number for, is left out.
_EPOCH = {
    "train_loss": "train/loss",
    "lr": "train/lr",
    "val_accuracy": "validation/accuracy",
    "density": "network/density",
    "dense_equivalent_epochs": "cost/dense_equivalent_epochs",
}
_ROUND = {
    "val_accuracy": "round/accuracy",
    "raw_accuracy": "round/raw_accuracy",
    "density": "round/density",
    "cost": "round/cost",
}
_FIT = {key: f"fit/{key}" for key in ("A0", "Ainf", "k", "x0", "gain", "gain_error")}


class Scalars:
    """A writer of event files in `RUN/tensorboard`.

    Args:
        run: the run folder.
        steps: optimizer steps of the run so far; TensorBoard drops what an interrupted run wrote beyond them.

    Raises:
        ConfigError: the package `tensorboard` is not installed.
    """

    def __init__(self, run: Path, steps: int) -> None:
        self.require()
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / FOLDER), purge_step=steps + 1 if steps else None)

    @staticmethod
    def require() -> None:
        """Raise `ConfigError` where the package is missing."""
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("`tensorboard` = True needs the package `tensorboard`: pip install tensorboard")

    def write(self, record: Mapping[str, Any], step: int) -> None:
        """Write the numbers of one record of the log, of an epoch or a round, at once."""
        if record["event"] == "round":
            self._put(record, _ROUND, step)
            self._put(record.get("fit") or {}, _FIT, step)
        elif record["event"] == "epoch":
            self._put(record, _EPOCH, step)
        self._writer.flush()

    def _put(self, record: Mapping[str, Any], tags: Mapping[str, str], step: int) -> None:
        for key, tag in tags.items():
            if record.get(key) is not None:
                self._writer.add_scalar(tag, record[key], step)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
