"""Keep decoded images in memory: for small images, to decode them anew is most of what reading costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch.utils.data import get_worker_info

__all__ = ["KeptImages"]

_OBJECT: Final = 1024  # bytes of an image beside its pixels


class KeptImages:
    """Images (PIL) by path, the first that fit into so many MB; no image is ever given up for another.

    Every epoch reads every image, in another order: to keep the latest ones would find none of them again. Loading
    processes keep nothing, as they end with their epoch, and are sent nothing. An image must not be changed in place by
    those who get it.
    """

    def __init__(self, megabytes: int) -> None:
        self._left = megabytes * 1_000_000
        self._images: dict[str, Any] = {}

    def get(self, path: str, decode: Callable[[str], Any]) -> Any:
        """Return the image kept for `path`, or else what `decode` makes of it."""
        image = self._images.get(path)
        if image is None:
            image = decode(path)
            size = _OBJECT + image.width * image.height * _bytes_a_pixel(image)
            if size <= self._left and get_worker_info() is None:
                self._left -= size
                image = self._images[path] = _pixels_of(image)
        return image

    def __getstate__(self) -> dict[str, Any]:
        """For a loading process, which reads a part of the images once."""
        return {"_left": 0, "_images": {}}


def _pixels_of(image: Any) -> Any:
    """A plain image without what its file's decoder and metadata take, which may be several times the pixels."""
    plain = image.copy()
    plain.info = {}
    return plain


def _bytes_a_pixel(image: Any) -> int:
    """PIL stores values of one byte as they are, and any others in four bytes a pixel."""
    return 1 if image.mode in ("1", "L", "P") else 4
