"""Say what is wrong with images that a network fails on: their type, their shape, or a batch of one."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from growfx.errors import DataError, GrowfxError
from growfx.masked.graph import MaskedGraph
from growfx.masked.isolation import undisturbed

__all__ = ["check_last_batch", "explaining_images"]

_ALONE = (
    "a batch of one image cannot be trained on: the network fails on one ({error}), and computes two; let the training "
    "loader leave a last batch of one out (`drop_last=True`), or take another `batch_size`"
)


@contextmanager
def explaining_images(net: nn.Module, images: Tensor) -> Generator[None]:
    """Raise `DataError` where a forward of `net` fails on images that are not like those it was recorded with.

    That they are the cause is tried: the network computes those it was recorded with, or two images where it fails on
    one. Any other failure is the model's, and is left as it is.
    """
    try:
        yield
    except (GrowfxError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        problem = _problem(net, images, error) if isinstance(net, MaskedGraph) else ""
        if not problem:
            raise
        raise DataError(problem) from error


def check_last_batch(net: MaskedGraph, loader: Any, example: Tensor) -> None:
    """Refuse a training loader whose batches, or last batch, are of one image, where `net` does not train on one.

    What a loader is not known to give is found while training.

    Args:
        net: left as it was.
        loader: looked at where it is a `DataLoader` that forms batches by a size.
        example: an image (1, ...), on the network's device.

    Raises:
        DataError: there is such a batch, and two images would do.
    """
    size = loader.batch_size if type(loader) is DataLoader else None
    if size is None or (loader.drop_last and size > 1):
        return
    sampler: Any = loader.sampler
    try:
        left = len(sampler) % size
    except TypeError:  # a sampler without a length
        return
    if size > 1 and left != 1:
        return
    training = net.training
    try:
        net.train()
        with undisturbed(net), torch.no_grad(), explaining_images(net, example):
            net(example)
    finally:
        net.train(training)


def _problem(net: MaskedGraph, images: Tensor, error: Exception) -> str:
    recorded = next((x for x in pytree.tree_leaves(net.example().values) if isinstance(x, Tensor)), None)
    said = str(error).strip().split("\n")[0].rstrip(".")[:200] or type(error).__name__
    if recorded is not None and (images.dtype, images.shape[1:]) != (recorded.dtype, recorded.shape[1:]):
        example = net.example(max(2, len(images)))
        if not _computes(net, *example.args, **example.kwargs):
            return ""
        got = f"{images.dtype} of shape {tuple(images.shape)}"
        wanted = f"{recorded.dtype} of shape (batch, {', '.join(map(str, recorded.shape[1:]))})"
        advice = "convert them in the loader's data set" if images.dtype != recorded.dtype else "give such images"
        return (
            f"the network fails on the images that the loader gives, {got} ({said}); it was recorded with {wanted}, "
            f"which it computes; {advice}, or wrap the model with example inputs of the other kind"
        )
    if net.training and len(images) == 1 and _computes(net, torch.cat([images, images])):
        return _ALONE.format(error=said)
    return ""


def _computes(net: MaskedGraph, *args: Any, **kwargs: Any) -> bool:
    """Whether a forward of `net` in its mode gives something, of which nothing is left."""
    try:
        with undisturbed(net), torch.no_grad():
            net(*args, **kwargs)
    except Exception:
        return False
    return True
