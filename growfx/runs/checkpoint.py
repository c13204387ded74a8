"""Write and read checkpoints atomically, verify them on reading, and keep the last ones.

A file is what `torch.save` writes of `{"format", "version", "digest", "state"}` with tensors, numbers, texts,
lists, tuples and dictionaries in it, so `torch.load(path, weights_only=True)` reads it. `digest` is a sha256
over the content of `state`: torch itself loads a flipped bit silently. It guards against damage, not
against forgery.
"""

import hashlib
import os
import shutil
import struct
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growfx.errors import CheckpointError

__all__ = ["Checkpoints", "content_digest"]

_FORMAT, _VERSION = "growfx-checkpoint", 1


class _DamageError(CheckpointError):
    """The content of a file is not what was written. A file of another program is not damaged."""


class Checkpoints:
    """The checkpoints of one run: the last `keep` as `step-000000001234.pt` in `folder`, and two of them by a name.

    `latest.pt` is the newest, `best.pt` the one of the best validation accuracy; they are second names (hard links) of
    numbered files where the file system has such, copies elsewhere. Folders of older versions, with `latest.pt` and
    `previous.pt` alone, are read, and become such a folder with the next checkpoints.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._damaged: list[Path] = []

    @property
    def latest(self) -> Path:
        """The path of the newest checkpoint."""
        return self.folder / "latest.pt"

    @property
    def best(self) -> Path:
        """The path of the checkpoint with the best validation accuracy."""
        return self.folder / "best.pt"

    def numbered(self) -> list[Path]:
        """The checkpoints by step, newest first."""
        found = [path for path in self.folder.glob("step-*.pt") if path.stem.removeprefix("step-").isdecimal()]
        return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")), reverse=True)

    def candidates(self) -> list[Path]:
        """Every file to continue from, newest first, each once."""
        found: dict[tuple[int, int], Path] = {}
        for path in [*self.numbered(), self.latest, self.folder / "previous.pt"]:
            with suppress(FileNotFoundError):  # a run that goes on may just have forgotten it
                facts = path.stat()
                found.setdefault((facts.st_dev, facts.st_ino), path)
        return list(found.values())

    def exists(self) -> bool:
        """True when there is something to continue from."""
        return bool(self.candidates())

    def save(self, state: Mapping[str, Any], *, steps: int, best: bool = False) -> None:
        """Write `state` as the newest checkpoint, then forget all but the last `keep`.

        Args:
            state: nested dictionaries, lists and tuples of tensors, numbers, texts, booleans and None.
            steps: optimizer steps of the run so far; they name the file.
            best: keep this one as `best.pt` too.

        Raises:
            CheckpointError: it cannot be written; the checkpoints on disk are then as they were.
        """
        plain = _portable(state, "state")
        content = {"format": _FORMAT, "version": _VERSION, "digest": content_digest(plain), "state": plain}
        new = self.folder / "step.pt.new"
        target = self.folder / f"step-{steps:012d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            new.unlink(missing_ok=True)  # left by a save that was killed, it may be `best.pt` as well
            with new.open("wb") as stream:
                torch.save(content, stream)
                stream.flush()
                os.fsync(stream.fileno())
            self._set_aside()
            if best:  # first: a run killed after the next line takes the best one for written
                _link(new, self.best)
            new.replace(target)
            _sync_folder(self.folder)
            _link(target, self.latest)
            self._forget()
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            # torch's writer, closed after a failed write, complains of where it stands and hides the reason
            hides = isinstance(error, RuntimeError) and isinstance(error.__context__, OSError)
            reason = " ".join(str(error.__context__ if hides else error).strip().splitlines()[:1])
            raise CheckpointError(
                f"checkpoint `{target}` cannot be written ({reason}); free space or make the folder "
                "writable, then continue with resume"
            ) from error

    def finish_save(self) -> None:
        """Do what a save that was killed left undone; for the one process that continues the run, after `load`.

        Then `latest.pt` is the newest, though no other save may follow. A failure is left to the next save to tell.
        """
        with suppress(OSError):
            for unfinished in self.folder.glob("*.pt.new"):
                unfinished.unlink()
            self._set_aside()
            numbered = self.numbered()
            if numbered and not (self.latest.exists() and self.latest.samefile(numbered[0])):
                _link(numbered[0], self.latest)
            self._forget()

    def _set_aside(self) -> None:
        """Rename what `load` found damaged, so that it is neither read again nor counted among those kept."""
        latest = self.latest
        for path in self._damaged:
            if latest.exists() and latest != path and latest.samefile(path):
                latest.unlink()
            path.replace(path.with_suffix(".damaged.pt"))
        self._damaged.clear()
        if latest.exists() and not any(latest.samefile(path) for path in self.numbered()):
            latest.replace(self.folder / "previous.pt")  # of an older version, or a copy

    def _forget(self) -> None:
        numbered = self.numbered()
        for path in numbered[self.keep :]:
            path.unlink()
        if len(numbered) >= self.keep:
            (self.folder / "previous.pt").unlink(missing_ok=True)

    def load(self) -> tuple[dict[str, Any], str | None]:
        """The newest undamaged state, and a notice when that is not the newest file.

        Nothing on disk is changed; the next `save` renames damaged files to `<name>.damaged.pt`.

        Raises:
            CheckpointError: there is none, all are damaged, or one is of another program or a newer version.
        """
        problems: list[str] = []
        self._damaged = []
        for path in self.candidates():
            try:
                state = read(path)
            except _DamageError as error:
                problems.append(str(error))
                self._damaged.append(path)
                continue
            except CheckpointError:
                if path.exists():
                    raise
                continue
            notice = f"{'; '.join(problems)}; continuing from the previous one, `{path}`" if problems else None
            return state, notice
        raise CheckpointError("; ".join(problems) or f"there is no checkpoint in `{self.folder}`")


def read(path: Path) -> dict[str, Any]:
    """The state in one checkpoint file, on the CPU.

    Raises:
        CheckpointError: missing, damaged, of another version, or not a growfx checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint `{path}` is not there") from error
    except Exception as error:  # the unpickler raises whatever the damage leads it into
        reason = " ".join(str(error).strip().splitlines()[:1])
        raise _DamageError(f"checkpoint `{path}` is damaged ({reason})") from error
    named = isinstance(content, dict) and {"format", "version", "digest", "state"} <= content.keys()
    if not (named and (content["format"], content["version"]) == (_FORMAT, _VERSION)) and _fails_its_sums(path):
        raise _DamageError(f"checkpoint `{path}` is damaged (its content does not match its check sums)")
    if not named or content["format"] != _FORMAT:
        raise CheckpointError(f"`{path}` is not a growfx checkpoint; it holds {_kind_of(content)}")
    if content["version"] != _VERSION:
        raise CheckpointError(
            f"checkpoint `{path}` has version {content['version']}; this growfx reads version {_VERSION}"
        )
    if content_digest(content["state"]) != content["digest"]:
        raise _DamageError(f"checkpoint `{path}` is damaged (its content does not match its digest)")
    return content["state"]


def _fails_its_sums(path: Path) -> bool:
    """Whether what torch wrote was changed since: its archives hold a check sum of every part, which it never reads."""
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"PK\x03\x04":  # older files of torch are not archives
                return False
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except Exception:  # the reader raises whatever the damage leads it into
        return True


def _kind_of(content: Any) -> str:
    if isinstance(content, dict) and content:
        names = ", ".join(f"`{key}`" for key in list(content)[:3])
        what = "the state dict of a model" if all(isinstance(v, Tensor) for v in content.values()) else "a dictionary"
        return f"{what} with {names}{' and more' if len(content) > 3 else ''}"
    return f"a {type(content).__name__}"


def content_digest(value: Any) -> str:
    """sha256 (hex) over nested containers, tensors and scalars; types, order and bits count."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"T{value.dtype}{tuple(value.shape)}".encode())
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    elif isinstance(value, dict):
        digest.update(b"D%d" % len(value))
        for key, item in value.items():
            _feed(digest, key)
            _feed(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(b"%s%d" % (type(value).__name__.encode(), len(value)))
        for item in value:
            _feed(digest, item)
    elif isinstance(value, float):
        digest.update(b"f" + struct.pack("<d", value))
    else:
        text = str(value).encode()
        digest.update(b"%s%d:" % (type(value).__name__.encode(), len(text)) + text)


def _portable(value: Any, where: str) -> Any:
    """What `torch.load(weights_only=True)` accepts, of the same values: plain containers, tensors without a history.

    A tensor that is a view of a larger storage would be stored with all of it, hence the copy of such.
    """
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        return plain.clone() if plain.untyped_storage().nbytes() > plain.nbytes else plain
    if isinstance(value, Mapping):
        return {_portable(k, where): _portable(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_portable(item, where) for item in value]
        return items if isinstance(value, list) else tuple(items)
    # numpy's scalars are subclasses of Python's and would be stored as numpy objects.
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise TypeError(f"{where}: a checkpoint cannot hold a {type(value).__name__}")


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, in one step; a copy where links are not possible."""
    new = target.with_name(target.name + ".new")
    new.unlink(missing_ok=True)
    try:
        os.link(source, new)
    except OSError:
        shutil.copyfile(source, new)
    new.replace(target)


def _sync_folder(folder: Path) -> None:
    """Make renames durable; some systems cannot open a folder."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
