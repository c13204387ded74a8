"""The lock of a run's folder, between processes and within one."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from growfx.errors import CheckpointError
from growfx.runs import lock as run_lock
from growfx.runs.lock import LOCK_NAME, RunLock

fcntl = pytest.importorskip("fcntl", reason="the system has no such locks")

HOLD = """
import sys
from pathlib import Path
from growfx.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""


@contextmanager
def another_process(folder: Path) -> Generator[subprocess.Popen[str]]:
    """A process that holds the lock of `folder` until it reads a line."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def open_files() -> set[str]:
    return {os.path.realpath(f"/proc/self/fd/{handle}") for handle in os.listdir("/proc/self/fd")}


def is_free(folder: Path) -> bool:
    """Whether a new lock can be had; nothing is left of it."""
    lock = RunLock(folder)
    try:
        lock.acquire()
    except CheckpointError:
        return False
    lock.release()
    return True


def test_a_folder_is_refused_while_another_process_has_it_and_that_process_is_named(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        with pytest.raises(CheckpointError, match=str(process.pid)) as caught:
            RunLock(tmp_path).acquire()
        assert str(tmp_path) in str(caught.value)
        assert socket.gethostname() in str(caught.value)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "released\n"
        assert is_free(tmp_path)  # while the process goes on


def test_a_process_that_is_killed_leaves_a_file_that_refuses_nobody(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.kill()
        process.wait()
        assert (tmp_path / LOCK_NAME).exists()
        assert is_free(tmp_path)


def test_a_second_run_of_this_process_is_refused_by_whatever_path_it_comes(tmp_path: Path) -> None:
    folder, link = tmp_path / "run", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    lock, other = RunLock(folder), tmp_path / "other"
    other.mkdir()
    lock.acquire()
    assert not is_free(folder)
    assert not is_free(link)
    assert is_free(other)
    lock.release()
    assert is_free(link)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are read from /proc")
def test_a_lock_given_back_leaves_neither_file_nor_handle(tmp_path: Path) -> None:
    lock, file = RunLock(tmp_path), tmp_path / LOCK_NAME
    for _ in range(2):
        lock.acquire()
        assert json.loads(file.read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
        assert str(file) in open_files()
        lock.release()
        assert not list(tmp_path.iterdir())
        assert not any(str(tmp_path) in name for name in open_files())
    lock.release()  # a second time does nothing


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are read from /proc")
def test_one_that_is_refused_leaves_no_handle_and_gives_nothing_back(tmp_path: Path) -> None:
    lock, refused = RunLock(tmp_path), RunLock(tmp_path)
    lock.acquire()
    before = open_files()
    with pytest.raises(CheckpointError):
        refused.acquire()
    refused.release()
    assert open_files() == before
    assert not is_free(tmp_path)
    lock.release()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are read from /proc")
def test_a_file_taken_away_between_opening_and_locking_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, lockf, calls = tmp_path / LOCK_NAME, fcntl.lockf, []

    def taken_away(handle: int, flags: int) -> None:
        calls.append(flags)
        lockf(handle, flags)
        if len(calls) == 1:
            file.unlink()  # by the one who had the lock until now
        elif len(calls) == 2:
            file.unlink()  # and another one has made a new one already
            file.touch()

    monkeypatch.setattr(run_lock.fcntl, "lockf", taken_away)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert len(calls) == 3
    assert json.loads(file.read_text())["pid"] == os.getpid()
    lock.release()
    assert not any(str(tmp_path) in name for name in open_files())


@pytest.mark.parametrize("owner", ["", "{", "[]", '{"pid": 3}'])
def test_an_owner_who_cannot_be_read_is_refused_for_all_the_same(
    owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK_NAME).write_text(owner)

    def held(*_: Any) -> None:
        raise OSError(errno.EAGAIN, "held")

    monkeypatch.setattr(run_lock.fcntl, "lockf", held)
    with pytest.raises(CheckpointError, match="another process") as caught:
        RunLock(tmp_path).acquire()
    assert str(tmp_path) in str(caught.value)


def test_where_there_are_no_locks_nobody_is_refused_by_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_here(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    with another_process(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(run_lock.fcntl, "lockf", none_here)
            assert is_free(tmp_path)
        monkeypatch.setattr(run_lock, "fcntl", None)
        assert is_free(tmp_path)
