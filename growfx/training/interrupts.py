"""Defer SIGTERM and Ctrl-C until the run can be resumed."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from growfx.distributed import ranks

__all__ = ["Interrupts", "Stopped"]


class Stopped(BaseException):
    """Unwinds a run that was asked to end; `growfx.train` turns it into what the signal stands for."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """Within `with`, SIGTERM and Ctrl-C are noted; `check` raises `Stopped` for one that has come.

    Among several ranks, one that has come to any of them ends all at the same `check`.

    A handler of the caller's own is left in place, and outside the main thread nothing is taken over. A second Ctrl-C
    is a `KeyboardInterrupt` on the spot. On leaving, `Stopped` becomes `KeyboardInterrupt` for Ctrl-C and `SystemExit`
    with status 143 (128 + 15, as a shell tells of SIGTERM) for SIGTERM.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
                if signal.getsignal(number) is default:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if isinstance(error, Stopped):
            if error.number == signal.SIGINT:
                raise KeyboardInterrupt from error
            raise SystemExit(128 + error.number) from error

    def check(self) -> None:
        """Raise `Stopped` if a signal has come, to this rank or another."""
        (number,) = ranks.largest(self.pending or 0)
        if number:
            raise Stopped(number)

    @contextmanager
    def at_once(self) -> Generator[None]:
        """Around what may be broken off at any point: a signal raises `Stopped` there and then.

        Not among several ranks, where the others would wait for this one: there it is noted as elsewhere.
        """
        self._at_once = ranks.world_size() == 1
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.pending is not None:
            raise KeyboardInterrupt
        self.pending = number
        if self._at_once:
            self._at_once = False
            raise Stopped(number)
