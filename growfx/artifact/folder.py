"""Read the config of an artifact's folder, and find its weights file.

Only plain names of regular files inside the folder are followed. One kind of link is: in the cache of
`huggingface_hub` every file of a snapshot is a link to `../../blobs/DIGEST` (docs: "Understand caching"), and
since release 2 such a blob may be a link to `../../blobs/XX/DIGEST` in a store that all repositories share.
Exactly that layout is allowed, with every part of it where the hub's client puts it.
"""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from growfx.artifact.manifest import check_version
from growfx.artifact.weights_file import MAX_HEADER, SNIFFED, open_regular, parse_json, wrong_file
from growfx.errors import ArtifactError

__all__ = ["CONFIG", "is_plain_name", "read_config", "weights_file"]

CONFIG = "config.json"

_REPOSITORY = re.compile(r"(?:models|datasets|spaces)--.+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Git's digest of small files, SHA-256 of large ones.
_BLOB = re.compile(r"\.\./\.\./blobs/([0-9a-f]{40}|[0-9a-f]{64})")
_SHARED_BLOB = re.compile(r"\.\./\.\./blobs/([0-9a-f]{2})/(\1[0-9a-f]{62})")
_SHARED_MARKER = ".huggingface-shared-blobs"


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`, with its `growfx` block checked for format and version.

    Raises:
        ArtifactError: none, not readable, without a `growfx` block, or of a newer format.
    """
    file = folder / CONFIG
    if not os.path.lexists(file):
        raise ArtifactError(f"the folder has no `{CONFIG}`, so it holds no artifact")
    _check_link(folder, file)
    try:
        with open_regular(file) as stream:
            data = stream.read(MAX_HEADER + 1)
    except OSError as error:
        raise ArtifactError(f"its `{CONFIG}` cannot be read ({error})") from error
    if len(data) > MAX_HEADER:
        raise ArtifactError(f"its `{CONFIG}` cannot be read: it has more than {MAX_HEADER} bytes")
    try:
        config = parse_json(np.frombuffer(data, dtype=np.uint8), f"its `{CONFIG}`")
    except ArtifactError as error:
        reason = wrong_file(data[:SNIFFED]) or str(error)
        raise ArtifactError(f"its `{CONFIG}` cannot be read: {reason}") from error
    if not isinstance(config, dict) or not isinstance(config.get("growfx"), dict):
        inner = "; that of a run is its folder `artifact`" if os.path.lexists(folder / "artifact" / CONFIG) else ""
        raise ArtifactError(f"its `{CONFIG}` has no `growfx` block, so the folder holds no artifact{inner}")
    check_version(config["growfx"].get("format"), config["growfx"].get("version"))
    return config


def weights_file(folder: Path, config: Mapping[str, Any]) -> Path:
    """The file that `config` names, if it is one of the folder.

    Raises:
        ArtifactError: not a plain name, missing, or a link out of the folder.
    """
    name = config["growfx"].get("weights")
    if not is_plain_name(name):
        raise ArtifactError(f"its `{CONFIG}` names the weights file `{name}`; only a plain file name is allowed")
    file = folder / name
    if not file.exists():
        raise ArtifactError(f"its weights file `{name}` is missing; a download may have been cut short")
    _check_link(folder, file)
    return file


def is_plain_name(name: object) -> bool:
    """Whether `name` is a plain file name, not a path, on any system."""
    return (
        isinstance(name, str)
        and 0 < len(name) < 256
        and name.isprintable()
        and not name.startswith(".")
        and not any(c in name for c in "/\\:")
    )


def _check_link(folder: Path, file: Path) -> None:
    if not file.is_symlink():
        return
    try:
        inside = file.resolve(strict=True).parent == folder.resolve()
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"its `{file.name}` is a link to nothing ({error})") from error
    if not inside and not _is_cached(folder, file):
        raise ArtifactError(f"its `{file.name}` is a link out of the folder; load that file by its own path")


def _is_cached(folder: Path, file: Path) -> bool:
    """Whether `file` is a link that huggingface_hub makes in its cache: `models--X/snapshots/COMMIT/file`."""
    snapshot = folder.resolve()
    repository, link = snapshot.parent.parent, _BLOB.fullmatch(os.readlink(file))
    layout = (
        _COMMIT.fullmatch(snapshot.name)
        and snapshot.parent.name == "snapshots"
        and _REPOSITORY.fullmatch(repository.name)
    )
    if not link or not layout or not _is_kind(repository / "blobs", stat.S_ISDIR):
        return False
    blob = repository / "blobs" / link[1]
    if _is_kind(blob, stat.S_ISREG):
        return True
    shared = _SHARED_BLOB.fullmatch(os.readlink(blob)) if blob.is_symlink() else None
    store = repository.parent / "blobs"
    return (
        shared is not None
        and _is_kind(store, stat.S_ISDIR)
        and _is_kind(store / _SHARED_MARKER, stat.S_ISREG)
        and _is_kind(store / shared[1], stat.S_ISDIR)
        and _is_kind(store / shared[1] / shared[2], stat.S_ISREG)
    )


def _is_kind(path: Path, kind: Any) -> bool:
    try:
        return kind(path.lstat().st_mode)
    except OSError:
        return False
