"""Open an artifact for reading; config, manifest and weights file must agree, and every stream is checked when read.

Needs numpy only. Everything is checked before it is used: the folder's config names a plain file inside the
folder and gives its SHA-256; the manifest gives its own; names, dtypes and shapes of the file are those of the
manifest; every stream has its CRC-32.
"""

import hashlib
import numbers
import os
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from growfx.artifact.codec import IndexStream, Positions, ValueStream, decode_index, decode_values
from growfx.artifact.folder import CONFIG, read_config, weights_file
from growfx.artifact.hub import local_path
from growfx.artifact.manifest import ITEMSIZES, DenseEntry, Manifest, SparseEntry, from_metadata
from growfx.artifact.weights_file import MAX_HEADER, SNIFFED, WeightsFile, open_regular, wrong_file
from growfx.errors import ArtifactError

__all__ = ["DEFAULT_MAX_BYTES", "ArtifactFile", "check_size", "listed", "located", "opened"]

DEFAULT_MAX_BYTES = 1 << 36

_SHOWN_NAMES = 4
_LONGEST_MESSAGE = 2000


class ArtifactFile:
    """The weights file of an artifact, whose header agrees with its manifest.

    Attributes:
        manifest: what it says about itself.
        size: bytes of the file.
    """

    def __init__(self, file: WeightsFile) -> None:
        self._file, self.size = file, file.size
        self.manifest = from_metadata(file.metadata)
        self._check_header()

    def bits(self, name: str) -> NDArray[Any]:
        """Bit patterns of a tensor as a flat array of unsigned integers, +0 outside the mask.

        A complex number is two of them, real and imaginary part.

        Raises:
            ArtifactError: a stream is damaged.
        """
        entry = self.manifest.tensors[name]
        if isinstance(entry, SparseEntry):
            flat = np.zeros(entry.numel, dtype=f"u{ITEMSIZES[entry.dtype]}")
            flat[self.positions(name)] = self.values(name)
            return flat
        return self.values(name)

    def positions(self, name: str) -> Positions | None:
        """Positions of the active weights of a tensor in C order; None where all elements are stored.

        Raises:
            ArtifactError: the index is damaged.
        """
        entry = self.manifest.tensors[name]
        if isinstance(entry, DenseEntry):
            return None
        with located(f"mask of `{name}`"):
            data = self._stream(f"{name}::index", entry.index_crc32)
            return decode_index(IndexStream(entry.index_codec, entry.index_raw, data.data), entry.nnz, entry.numel)

    def values(self, name: str) -> NDArray[Any]:
        """Bit patterns of the stored elements of a tensor, in C order.

        Raises:
            ArtifactError: the values are damaged.
        """
        entry = self.manifest.tensors[name]
        itemsize = min(ITEMSIZES[entry.dtype], 8 if entry.dtype != "C64" else 4)
        with located(f"tensor `{name}`"):
            if isinstance(entry, DenseEntry):
                values = self._stream(name, entry.crc32).view(f"<u{itemsize}")
            else:
                data = self._stream(f"{name}::values", entry.values_crc32)
                stream = ValueStream(entry.value_codec, entry.planes, data.data)
                values = decode_values(stream, entry.nnz, itemsize)
            if entry.dtype == "BOOL" and values.size and int(values.max()) > 1:
                raise ArtifactError("the artifact is damaged: a truth value is neither 0 nor 1")
            return values.astype(values.dtype.newbyteorder("="), copy=False)

    def _stream(self, name: str, crc32: int) -> NDArray[np.uint8]:
        data = self._file.read(name)
        if zlib.crc32(data.data) != crc32:
            raise ArtifactError("the artifact is damaged: its CRC-32 does not agree")
        return data

    def _check_header(self) -> None:
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, entry in self.manifest.tensors.items():
            stored = entry.stored(name)
            if expected.keys() & stored.keys():
                raise ArtifactError(f"the artifact is damaged: `{name}` is stored under a name that is taken")
            expected |= stored
        found = self._file.tensors
        if found.keys() != expected.keys():
            names = listed(sorted(found.keys() ^ expected.keys()))
            raise ArtifactError(f"the artifact is damaged: file and manifest disagree about {names}")
        for name, (dtype, shape) in expected.items():
            if (found[name].dtype, found[name].shape) != (dtype, shape):
                raise ArtifactError(f"the artifact is damaged: `{name}` is not the {dtype} {shape} of its manifest")


@contextmanager
def opened(path: str | Path, *, max_bytes: int | None) -> Generator[ArtifactFile]:
    """Open an artifact: a folder, its weights file alone, or `hf-hub:USER/NAME[@REVISION]`.

    Args:
        path: where it is.
        max_bytes: limit of the decoded tensors when they are read: the whole file is compared with the digest in the
            folder's config, if it is not too large for that. None: only the header will be read.

    Raises:
        ArtifactError: not an artifact, damaged, newer, or unreadable.
    """
    if max_bytes is not None and (not isinstance(max_bytes, numbers.Real) or isinstance(max_bytes, bool)):
        raise ArtifactError(f"`max_bytes` is {max_bytes!r}; allowed: a number of bytes")
    with located(f"`{path}`"):
        try:
            place = local_path(path)
            config = read_config(place) if place.is_dir() else None
            file = place if config is None else weights_file(place, config)
            if not file.exists():
                raise ArtifactError("there is no artifact at this path; give a folder or its weights file")
            with open_regular(file) as stream:
                if config is not None:
                    _check_described(stream, config["growfx"], file.name, max_bytes)
                artifact = ArtifactFile(WeightsFile(stream))
                if config is not None:
                    _check_config(config, artifact.manifest)
                yield artifact
        except OSError as error:
            raise ArtifactError(f"it cannot be read ({error})") from error
        except MemoryError as error:
            raise ArtifactError("it needs more memory than there is; see max_bytes") from error


def check_size(manifest: Manifest, max_bytes: int) -> None:
    """Refuse a network larger than the caller allows, before anything of it is decoded.

    Raises:
        ArtifactError: its tensors take more than `max_bytes`.
    """
    if manifest.decoded_bytes > max_bytes:
        raise ArtifactError(
            f"its tensors take {manifest.decoded_bytes} bytes, more than max_bytes={max_bytes}; "
            "raise max_bytes if the artifact is to be trusted"
        )


@contextmanager
def located(what: str) -> Generator[None]:
    """Put `what` before the message of an ArtifactError.

    A file's own names go into messages: what could steer a terminal or break the line is escaped, and what is
    endless is cut.
    """
    try:
        yield
    except ArtifactError as error:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in f"{what}: {error}"[: 2 * _LONGEST_MESSAGE])
        if len(text) > _LONGEST_MESSAGE:
            text = f"{text[:_LONGEST_MESSAGE]} ..."
        # What is behind it stays; the same complaint without its place would only be noise.
        raise ArtifactError(text) from error.__cause__


def listed(names: list[str]) -> str:
    """The first names in backticks, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN_NAMES])
    return shown + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")


def _check_described(stream: BufferedReader, block: Mapping[str, Any], name: str, max_bytes: int | None) -> None:
    """Refuse a weights file that is not the one of the config, as plainly as it shows."""
    size, start = os.fstat(stream.fileno()).st_size, stream.read(SNIFFED)
    reason = wrong_file(start)
    if reason is None and size != block.get("bytes"):
        reason = (
            f"it has {size} bytes instead of {block.get('bytes')}: the download is incomplete or of another version"
        )
    elif reason is None and max_bytes is not None:
        # No codec makes a tensor larger than by a mask of one bit per element.
        if size > max_bytes * 9 // 8 + 2 * MAX_HEADER:
            raise ArtifactError(f"`{name}` has {size} bytes, too many for max_bytes={max_bytes}")
        stream.seek(0)
        same = hashlib.file_digest(stream, "sha256").hexdigest() == block.get("sha256")
        reason = None if same else "its SHA-256 differs"
    if reason is not None:
        raise ArtifactError(f"the artifact is damaged: `{name}` is not the file that `{CONFIG}` describes; {reason}")


def _check_config(config: Mapping[str, Any], manifest: Manifest) -> None:
    wrong = [f"`{key}`" for key, value in manifest.config.items() if config.get(key) != value]
    if config["growfx"].get("model") != manifest.model:
        wrong.append("`growfx.model`")
    if wrong:
        raise ArtifactError(f"its `{CONFIG}` was changed: {', '.join(wrong)} differ from the weights file's copy")
