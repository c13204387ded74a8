"""Turn images of 8 bits into normalized batches: at once, where timm's transforms do it image by image.

For small images the calls cost more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["NormalizedBatch", "normalize_by_batch"]


class NormalizedBatch:
    """Collates (image (H, W) or (H, W, C) of uint8, class number) to float32 (B, C, H, W) and int64 (B).

    Values are bit for bit those of torchvision's `ToTensor` and `Normalize` on each image.
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean[:, None, None], std[:, None, None]

    def __call__(self, samples: Sequence[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
        """Return the batch of `samples`, whose images are of one size."""
        pixels = np.stack([image for image, _ in samples])
        if pixels.ndim == 3:
            pixels = pixels[..., None]
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        images.div_(255).sub_(self.mean).div_(self.std)
        return images, torch.tensor([target for _, target in samples])


def normalize_by_batch(loader: DataLoader[Any]) -> None:
    """Let `loader` normalize whole batches, if scaling and normalization are the last its transforms do.

    They are not where a transform follows that draws on normalized values, such as random erasing.
    """
    from torchvision import transforms

    dataset: Any = loader.dataset
    steps = getattr(dataset.transform, "transforms", None)
    if not steps or len(steps) < 2:
        return
    *before, scale, normalize = steps
    if not isinstance(scale, transforms.ToTensor) or type(normalize) is not transforms.Normalize:
        return
    dataset.transform = transforms.Compose([*before, np.asarray])
    loader.collate_fn = NormalizedBatch(torch.as_tensor(normalize.mean), torch.as_tensor(normalize.std))
