"""Checkpoints: written whole or not at all, checked when read, the previous one kept.

A file is what `torch.save` writes of `{"format", "version", "digest", "state"}` with tensors, numbers, texts,
lists, tuples and dictionaries in it, so `torch.load(path, weights_only=True)` reads it. `digest` is a sha256
over the content of `state`: torch itself loads a flipped bit without a word. It guards against damage, not
against forgery.
"""

import hashlib
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growfx.errors import CheckpointError

__all__ = ["Checkpoints", "content_digest"]

_FORMAT, _VERSION = "growfx-checkpoint", 1


class Checkpoints:
    """The checkpoints of one run: `latest.pt`, `previous.pt` and `best.pt` in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def latest(self) -> Path:
        """Where the newest checkpoint is."""
        return self.folder / "latest.pt"

    @property
    def best(self) -> Path:
        """Where the checkpoint of the best validation accuracy is."""
        return self.folder / "best.pt"

    @property
    def previous(self) -> Path:
        """Where the one before the newest is."""
        return self.folder / "previous.pt"

    def exists(self) -> bool:
        """True when there is something to continue from."""
        return self.latest.exists() or self.previous.exists()

    def save(self, state: Mapping[str, Any], *, best: bool = False) -> None:
        """Write `state` as the newest checkpoint; the one before becomes `previous.pt`.

        Args:
            state: nested dictionaries, lists and tuples of tensors, numbers, texts, booleans and None.
            best: keep this one as `best.pt` too.

        Raises:
            CheckpointError: it cannot be written; the checkpoints on disk are then as they were.
        """
        plain = _portable(state, "state")
        content = {"format": _FORMAT, "version": _VERSION, "digest": content_digest(plain), "state": plain}
        new = self.folder / "latest.pt.new"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new.open("wb") as stream:
                torch.save(content, stream)
                stream.flush()
                os.fsync(stream.fileno())
            if best:
                _link(new, self.best)
            if self.latest.exists():
                self.latest.replace(self.previous)
            new.replace(self.latest)
            _sync_folder(self.folder)
        except (OSError, RuntimeError) as error:
            new.unlink(missing_ok=True)
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"checkpoint `{self.latest}` cannot be written ({reason}); free space or make the folder "
                "writable, then continue with resume"
            ) from error

    def load(self) -> tuple[dict[str, Any], str | None]:
        """The newest undamaged state, and a notice when that is not the newest file.

        A damaged newest file is moved aside to `latest.damaged.pt`, so that the next save keeps the good one.

        Raises:
            CheckpointError: there is none, or all are damaged.
        """
        problems = []
        for path in (self.latest, self.previous):
            if not path.exists():
                continue
            try:
                state = read(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if not problems:
                return state, None
            self.latest.replace(self.folder / "latest.damaged.pt")
            return state, f"{problems[0]}; continuing from the previous one, `{path}`"
        raise CheckpointError("; ".join(problems) or f"there is no checkpoint in `{self.folder}`")


def read(path: Path) -> dict[str, Any]:
    """The state in one checkpoint file, on the CPU.

    Raises:
        CheckpointError: missing, damaged, newer than this version, or not a growfx checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint `{path}` is not there") from error
    except Exception as error:  # the unpickler raises whatever the damage leads it into
        reason = str(error).strip().splitlines()[:1]
        raise CheckpointError(f"checkpoint `{path}` is damaged ({' '.join(reason)})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"`{path}` is not a growfx checkpoint")
    if content["version"] != _VERSION:
        raise CheckpointError(
            f"checkpoint `{path}` has version {content['version']}; this growfx reads version {_VERSION}"
        )
    if content_digest(content["state"]) != content["digest"]:
        raise CheckpointError(f"checkpoint `{path}` is damaged (its content does not match its digest)")
    return content["state"]


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
    """A copy of what `torch.load(weights_only=True)` accepts: plain containers, tensors without a history.

    A tensor that is a view of a larger storage would be stored with all of it, hence the clone.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
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
