"""Warn of training data that counts for less than the user may expect: left out of the loss, or of the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor
from torch.utils.data import DataLoader

from growfx.distributed import ranks
from growfx.notices import warn_once
from growfx.options import TrainOptions
from growfx.training.recipe import private_randomness

__all__ = ["TargetWatch", "warn_of_batches_left"]

_LEFT_OUT: Final = -100  # `ignore_index` of torch's cross-entropy


class TargetWatch:
    """Looks at the targets of each batch, and warns once of those that the loss leaves out or takes unsmoothed.

    `look` waits for no device; `tell` and `saw_empty_batch`, which do, are for now and then.
    """

    def __init__(self, options: TrainOptions) -> None:
        self.smoothing = options.label_smoothing
        self._unlabelled: Tensor | None = None
        self._empty: Tensor | None = None
        self._notes: list[str] = []
        self._told = False

    def look(self, targets: Tensor) -> None:
        """Take note of the targets of a batch as the loader gave them: class numbers (B) or mixed ones (B, classes)."""
        if targets.ndim == 2 and self.smoothing:
            warn_once(
                f"`label_smoothing` = {self.smoothing} has no effect on targets of shape (batch, classes), as the "
                "training loader gives them: the loss takes them as given; smooth them there, or give class numbers",
                self._notes,
            )
        if targets.ndim == 1:
            left_out = targets == _LEFT_OUT
            self._unlabelled = _either(self._unlabelled, left_out.any())
            self._empty = _either(self._empty, left_out.all())

    def saw_empty_batch(self) -> bool:
        """Whether the loss left out all images of a batch, the mean of which is not a number; on any rank."""
        (found,) = ranks.largest(self._empty is not None and bool(self._empty))
        return bool(found)

    def tell(self) -> None:
        """Warn where images without a class were among the batches looked at."""
        if self._told or self._unlabelled is None or not bool(self._unlabelled):
            return
        self._told = True
        warn_once(
            f"the training data has images of class number {_LEFT_OUT}, which the loss leaves out, as torch's "
            "cross-entropy does: they train nothing; leave them out of the data set, or give them a class",
            self._notes,
        )


def _either(before: Tensor | None, found: Tensor) -> Tensor:
    return found if before is None else before | found


def warn_of_batches_left(loader: Any, batches: Iterator[Any]) -> None:
    """Warn where `batches`, an epoch of `loader` after as many as its length says, has another one.

    Random numbers that are drawn for it do not count. An iterator that goes on in the next epoch, itself or as what a
    loader holds, loses nothing, and is left alone.
    """
    if isinstance(loader, Iterator):
        return
    with private_randomness():
        # A DataLoader begins anew each time, which may start processes.
        if not isinstance(loader, DataLoader) and iter(loader) is batches:
            return
        try:
            next(batches)
        except Exception:  # of whatever a loader does beyond its length, which nobody else asks for
            return
    warn_once(
        f"the training loader has a length of {len(loader)} batches and gives more, which are left out of each epoch; "
        "correct its `__len__` to train on them",
        [],
    )
