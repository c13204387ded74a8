"""Lock a run folder against other processes, by an operating-system lock on a file in it.

The system releases the lock however its process ends, so a leftover file does not block; it names the process for the
error message of others. Where such locks are missing (Windows, some network file systems) nothing is refused.
"""

import errno
import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

from growfx.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["LOCK_NAME", "RunLock"]

LOCK_NAME = ".lock"

# The system's locks are a process's: two runs of one process would not see each other's.
_OWN: set[tuple[int, str]] = set()
_GUARD = threading.Lock()


class RunLock:
    """The lock of the run in `folder`, held between `acquire` and `release`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK_NAME
        self._handle: int | None = None
        self._name = (0, "")

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            CheckpointError: another process has it, or another run of this one; names the process and its machine.
        """
        name = (os.getpid(), os.path.realpath(self.folder))
        with _GUARD:
            if name in _OWN:
                raise CheckpointError(f"run folder `{self.folder}` is in use by another run of this process")
            self._handle = self._locked()
            _OWN.add(name)
            self._name = name

    def _locked(self) -> int | None:
        if fcntl is None:
            return None
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                # not flock: loading processes would inherit that and hold it a while after this process was killed
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.pread(handle, 500, 0).decode(errors="replace")
                os.close(handle)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise CheckpointError(_in_use(self.folder, owner)) from error
                return None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), self.path.stat()):
                    break
            os.close(handle)  # the one before has taken its file away in the meantime
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        return handle

    def release(self) -> None:
        """Give the lock back, if it is held, and remove its file."""
        with _GUARD:
            if self._name != (0, ""):
                _OWN.discard(self._name)
                self._name = (0, "")
        if self._handle is not None:
            with suppress(OSError):
                self.path.unlink()
            os.close(self._handle)
            self._handle = None


def _in_use(folder: Path, owner: str) -> str:
    try:
        facts = json.loads(owner)
        who = f"process {facts['pid']} on `{facts['host']}`"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return f"run folder `{folder}` is in use by {who}; wait for it or end it, or choose another folder"
