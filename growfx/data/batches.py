"""Continue an epoch in its middle with the same order and augmentation."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from growfx.errors import DataError

__all__ = ["SampleSeeded", "batches_from", "pair_of"]


class SampleSeeded(Dataset[Any], ABC):
    """A data set whose loading processes draw for each sample anew, from the epoch's seed and the sample's number.

    Then what is drawn for a sample depends neither on the samples a process has loaded before, nor on how many
    processes there are, and an epoch can be continued in its middle without loading its beginning.
    """

    @abstractmethod
    def load(self, position: int) -> Any:
        """Return the sample of this number."""

    def __getitem__(self, position: int) -> Any:
        worker = get_worker_info()
        if worker is not None:
            # a worker's seed is that of the epoch plus its own number
            words = np.random.SeedSequence([worker.seed - worker.id, position]).generate_state(2)
            torch.default_generator.manual_seed(int(words[0]))
            np.random.seed(int(words[1]))  # noqa: NPY002 - timm's transforms draw from it
            random.seed(int(words[0]))
        return self.load(position)


def pair_of(batch: Any) -> tuple[Tensor, Tensor]:
    """Images (B, ...) and class numbers (B, int64) of what a loader gave, or mixed targets (B, classes) as they are.

    Raises:
        DataError: it is something else.
    """
    parts: Any = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if len(parts) == 2 and all(isinstance(part, Tensor) and part.ndim for part in parts):
        if len(parts[0]) == len(parts[1]):
            return parts[0], _class_numbers(parts[1])
        found = f"{len(parts[0])} images with {len(parts[1])} class numbers"
    else:
        found = f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in parts) or 'nothing'}"
    raise DataError(
        f"a loader expects batches that are pairs of tensors (images, class numbers), equally many, got {found}; give "
        "one that makes such pairs (its `collate_fn`), or write your own loop with `method.attach` and `method.step`"
    )


def _class_numbers(targets: Tensor) -> Tensor:
    """Targets as losses take them: what has another shape or type would be broadcast, or fail with torch's words."""
    floating = targets.is_floating_point() or targets.is_complex()
    if targets.ndim == 1 and not floating:
        return targets.long()
    if targets.ndim == 2 and targets.is_floating_point():
        return targets
    raise DataError(
        f"a loader expects class numbers, whole numbers of shape (batch,), got {targets.dtype} of shape "
        f"{tuple(targets.shape)}; give those, or train on other targets in your own loop with `method.attach` and "
        "`method.step`"
    )


def batches_from(loader: Iterable[Any], done: int, ready: Callable[[], None]) -> Iterator[Any]:
    """The batches of `loader` after the first `done`, in the order the whole epoch has them.

    The generators that give the order must have been seeded as for the whole epoch. `ready` is called when the order
    has been drawn, before anything is drawn for the batches to come: the place to put back the state of generators.

    A `DataLoader` with a map-style data set passes over the first batches without loading them, if it loads in this
    process or its data set is `SampleSeeded`. Any other loader loads them all, because what its processes draw for a
    batch depends on those before.
    """
    if not done:
        return iter(loader)
    if _passes_over(loader):
        return iter(_rest_of(loader, done, ready))
    return _after_loading(loader, done, ready)


def _passes_over(loader: Any) -> bool:
    # subclasses may do what they like
    return (
        type(loader) is DataLoader
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
        and (loader.num_workers == 0 or isinstance(loader.dataset, SampleSeeded))
    )


def _rest_of(loader: Any, done: int, ready: Callable[[], None]) -> DataLoader[Any]:
    return DataLoader(
        loader.dataset,
        batch_sampler=_After(loader.batch_sampler, done, ready),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        pin_memory_device=loader.pin_memory_device,
        in_order=loader.in_order,
    )


class _After(Sampler[list[int]]):
    """Another sampler's batches after the first `done`."""

    def __init__(self, batches: Iterable[list[int]], done: int, ready: Callable[[], None]) -> None:
        self.batches, self.done, self.ready = batches, done, ready

    def __iter__(self) -> Iterator[list[int]]:
        return self._go_on(iter(self.batches))  # not later: a sampler may draw its order here

    def _go_on(self, batches: Iterator[list[int]]) -> Iterator[list[int]]:
        for _ in islice(batches, self.done):
            pass
        self.ready()
        yield from batches


def _after_loading(loader: Iterable[Any], done: int, ready: Callable[[], None]) -> Iterator[Any]:
    batches = iter(loader)
    for _ in islice(batches, done):
        pass
    ready()
    yield from batches
