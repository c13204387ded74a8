"""One network of the native runtime, called from any number of threads."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from growfx.runtime.native.library import MOST_THREADS, NativeNetwork

__all__ = ["Sessions"]

# Networks that are kept for later calls; each has its own copy of the weights and its own buffers.
_MOST_IDLE = 4
# A network that was planned in this process asks for what it needs, unlike a file from elsewhere.
_ROW_BYTES = 2**63 - 1


class Sessions:
    """A network that several threads may call at the same time; a copy of it is opened for each that does.

    Args:
        data: the bytes of `network.gfx`.

    Raises:
        ConfigError: there is no library, or it cannot run the network.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._idle: list[tuple[int, NativeNetwork]] = [(1, NativeNetwork(data, row_bytes=_ROW_BYTES))]
        self._lock = threading.Lock()
        _ALL.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and plan, as they are kept to open it once more."""
        return len(self._data)

    def run(self, batch: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, computed with as many threads as torch has.

        Args:
            batch: the batch size.
            inputs: contiguous, float32, on the CPU, of the network's shapes at this batch size.

        Raises:
            ConfigError: a batch that the network does not take, for want of memory, say.
        """
        network = self._take(batch)
        # Not given back after an error: what it was prepared for is not known then.
        network.set_threads(min(torch.get_num_threads(), MOST_THREADS))
        outputs = network.run(batch, inputs)
        with self._lock:
            if len(self._idle) < _MOST_IDLE:
                self._idle.append((batch, network))
        return outputs

    def _take(self, batch: int) -> NativeNetwork:
        """One that nobody uses, if there is one that was prepared for this batch size."""
        with self._lock:
            if self._idle:
                sizes = [size for size, _ in self._idle]
                return self._idle.pop(sizes.index(batch) if batch in sizes else 0)[1]
        return NativeNetwork(self._data, row_bytes=_ROW_BYTES)

    def _after_fork(self) -> None:
        # Of the threads of the parent only the one that forked is here: neither their work nor their locks end.
        self._lock = threading.Lock()
        for _, network in self._idle:
            network.abandon()
        self._idle = []


_ALL: weakref.WeakSet[Sessions] = weakref.WeakSet()


def _after_fork() -> None:
    for sessions in list(_ALL):
        sessions._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
