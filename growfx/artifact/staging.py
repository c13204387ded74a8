"""Write a folder as a whole or not at all."""

import os
import shutil
import threading
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

__all__ = ["staged_folder"]

_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def staged_folder(target: Path, *, last: str, first: str = "", stale: Iterable[str] = ()) -> Generator[Path]:
    """Yield an empty folder; when the block ends well, its files are on disk and move to `target` together.

    A new `target` appears by one rename. In an existing one each file is replaced by one rename, the one called `first`
    at the beginning and the one called `last` at the end, and other files stay; when a rename fails or is interrupted,
    those done before are undone. When the block raises, `target` is as it was. Threads that fill one folder do so one
    after the other.

    Args:
        target: the folder to fill; parents are made.
        last: the file that refers to the others.
        first: the file that shows whose the others are, should the process be killed between two renames.
        stale: files of an earlier write to remove.

    Raises:
        OSError: the folder cannot be written.
    """
    exists = target.is_dir()
    if not exists:
        target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target's files, for a rename does not leave its file system.
    stage = (target if exists else target.parent) / f".{uuid.uuid4().hex}.tmp"
    stage.mkdir()
    try:
        yield stage
        for file in stage.iterdir():
            _sync(file)
        _sync(stage)
        with _ONE_AT_A_TIME:
            exists = target.is_dir()  # another thread may have made it since
            if exists:
                names = sorted((file.name for file in stage.iterdir()), key=lambda name: (name == last, name != first))
                _replace_all(stage, target, names, [name for name in stale if name not in names])
            else:
                stage.rename(target)
        _sync(target if exists else target.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace_all(stage: Path, target: Path, names: list[str], stale: list[str]) -> None:
    kept = stage / "kept"
    kept.mkdir()
    touched: list[str] = []
    try:
        for name in [*stale, *names]:
            touched.append(name)
            if (target / name).exists():
                _keep(target / name, kept / name)
            if name in names:
                os.replace(stage / name, target / name)
            else:
                (target / name).unlink(missing_ok=True)
    except BaseException:  # Ctrl-C too, or the kept files would go with the stage
        for name in touched:
            if (kept / name).exists():
                os.replace(kept / name, target / name)
            elif name in names and not (stage / name).exists():
                (target / name).unlink()
        raise


def _keep(file: Path, copy: Path) -> None:
    # A second link leaves the file in place until it is replaced; not every file system has links.
    try:
        os.link(file, copy)
    except OSError:
        os.rename(file, copy)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        # Some file systems cannot sync a folder; the files in it are safe by then.
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
