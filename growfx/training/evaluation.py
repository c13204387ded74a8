"""Accuracy of a network, and how far a measured accuracy can be trusted."""

import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growfx.data.batches import pair_of
from growfx.data.loaders import is_shared_out, sampler_of
from growfx.distributed import ranks
from growfx.errors import ConfigError, DataError
from growfx.masked.agreement import share_buffers
from growfx.masked.graph import MaskedGraph
from growfx.masked.shared import is_shared
from growfx.runs.checkpoint import content_digest
from growfx.training.images import explaining_images

__all__ = ["Score", "count_classes", "evaluate", "explaining_class_numbers", "logits_of", "paired_noise"]


@dataclass(frozen=True)
class Score:
    """Accuracy on one split.

    Attributes:
        correct: bool, one entry an image, in the order of the loader.
    """

    correct: Tensor

    @property
    def accuracy(self) -> float:
        """Fraction of images classified correctly."""
        return int(self.correct.sum()) / len(self.correct)

    @property
    def standard_error(self) -> float:
        """Binomial standard deviation of the accuracy over draws of other images.

        One error each way is added (Agresti and Coull's idea), so that it does not vanish at 0 and 1.
        """
        n = len(self.correct)
        p = (int(self.correct.sum()) + 1) / (n + 2)
        return math.sqrt(p * (1 - p) / (n + 2))


def evaluate(net: nn.Module, loader: Iterable[Any], device: torch.device | str) -> Score:
    """Top-1 score of `net` in eval mode; the mode it was in is restored.

    Among several ranks it is the same on each: of norm statistics of rank 0 and of the images of all ranks. Images that
    a sampler repeats to fill up the ranks' parts (`DistributedSampler`, timm's `OrderedDistributedSampler`) count once,
    and so do those of loaders that give every rank the same.

    Args:
        loader: gives (images (B, ...), class numbers (B)).

    Raises:
        DataError: the loader is empty, gives something else, images that a masked network cannot compute, or class
            numbers that the network has no output for.
    """
    training = net.training
    together = isinstance(net, MaskedGraph) and is_shared(net)
    if together:
        share_buffers(net)
    sampler = sampler_of(loader)
    compared = together and not is_shared_out(sampler)
    net.eval()
    found: list[Tensor] = []
    images_seen: list[str] = []
    try:
        with torch.no_grad():
            for images, targets in map(pair_of, loader):
                if compared:
                    images_seen.append(content_digest(images))
                images = images.to(device, non_blocking=True)
                with explaining_images(net, images):
                    output = net(images)
                logits = logits_of(output)
                if targets.ndim != 1:
                    raise DataError(
                        f"accuracy is of class numbers (batch,), and the loader gives mixed targets of shape "
                        f"{tuple(targets.shape)}; mix training batches alone"
                    )
                outside = targets[(targets < 0) | (targets >= logits.shape[1])]
                if len(outside):
                    raise DataError(
                        f"the data has class number {int(outside[0])}, but the network has {logits.shape[1]} outputs"
                    )
                found.append(logits.argmax(1).cpu() == targets.cpu())
    finally:
        net.train(training)
    if not found:
        raise DataError("the loader to evaluate on gives no images")
    correct = torch.cat(found)
    if not together:
        return Score(correct)
    return Score(_of_what_each_saw(correct, images_seen) if compared else _of_parts(correct, sampler))


def _of_parts(correct: Tensor, sampler: Any) -> Tensor:
    """Join what the ranks found of the parts that `sampler` gave them, in its order."""
    # rank r has every image number r, r + ranks, ...; images are repeated at the end to make the parts equal
    return torch.stack(ranks.everyone(correct), 1).reshape(-1)[: len(sampler.dataset)]


def _of_what_each_saw(correct: Tensor, images: list[str]) -> Tensor:
    """Take rank 0's word where all ranks saw the same `images`, else that of every rank, in their order."""
    parts = ranks.everyone((correct, images))
    if all(seen == images for _, seen in parts):
        return parts[0][0]
    return torch.cat([part for part, _ in parts])


def count_classes(net: nn.Module, images: Tensor) -> int:
    """How many classes `net` scores; its mode is restored. ConfigError where it gives no scores of two or more,
    DataError where it cannot compute the images.
    """
    training = net.training
    try:
        with torch.no_grad(), explaining_images(net.eval(), images):
            classes = logits_of(net(images)).shape[1]
    finally:
        net.train(training)
    if classes < 2:
        raise ConfigError(
            f"the network has {classes} output, and training here needs a score for each of two or more classes; "
            "give it one output for each class, or train it in your own loop with `method.attach` and `method.step`"
        )
    return classes


@contextmanager
def explaining_class_numbers(targets: Tensor, classes: int) -> Generator[None]:
    """Raise `DataError` where what is done with class numbers fails for there is no such class, as torch notices on a
    CPU.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        least, most = int(targets.min()), int(targets.max())
        if targets.ndim != 1 or (least >= 0 and most < classes):
            raise
        raise DataError(
            f"the training data has class numbers from {least} to {most}, but the network has {classes} outputs"
        ) from error


def logits_of(output: Any) -> Tensor:
    """The class scores (B, classes) in a network's output: the output itself, or the first part of a tuple
    (torchvision's networks with auxiliary heads).
    """
    first = output[0] if isinstance(output, tuple) and output else output
    if isinstance(first, Tensor) and first.ndim == 2:
        return first
    kind = f"a tensor of shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
    raise ConfigError(f"the network's output is {kind}; training needs class scores of shape (batch, classes)")


def paired_noise(now: Score, before: Score) -> float:
    """Standard deviation of one accuracy, seen against another one on the same images.

    Two networks scored on the same images share most of the binomial error, and only what they classify
    differently tells them apart: the difference of their accuracies has variance (d - diff^2) / n with d the
    fraction of images that one has right and the other wrong (McNemar 1947); half of it belongs to each. One
    disagreement is added, so that it does not vanish for equal networks.
    """
    n = len(now.correct)
    if len(before.correct) != n:
        raise ValueError("scores of different images cannot be paired")
    disagree = (int((now.correct ^ before.correct).sum()) + 1) / n
    difference = now.accuracy - before.accuracy
    return math.sqrt((disagree - difference**2) / (2 * n))
