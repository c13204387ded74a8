"""Wide residual networks for 32-pixel images (Zagoruyko & Komodakis, BMVC 2016, arXiv 1605.07146).

Pre-activation basic blocks, 3x3 stem, widths 16k, 32k, 64k; a projection where width or resolution changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["wrn_16_2", "wrn_22_2"]


class Block(nn.Module):
    """BN-ReLU-conv twice; the shortcut starts from the activated input where it is a projection."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return self.conv2(F.relu(self.bn2(self.conv1(activated)))) + shortcut


class WideResNet(nn.Module):
    """Depth 6n + 4, widening factor k."""

    def __init__(self, depth: int, k: int, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        blocks, inputs = (depth - 4) // 6, 16
        self.conv1 = nn.Conv2d(in_chans, inputs, 3, 1, 1, bias=False)
        stages = []
        for width, stride in ((16 * k, 1), (32 * k, 2), (64 * k, 2)):
            stages.append(
                nn.Sequential(*(Block(width if i else inputs, width, 1 if i else stride) for i in range(blocks)))
            )
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.bn, self.fc = nn.BatchNorm2d(inputs), nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        x = F.relu(self.bn(self.stages(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def wrn_16_2(**options: int) -> WideResNet:
    """WRN-16-2: 0.69 million weights."""
    return WideResNet(16, 2, **options)


def wrn_22_2(**options: int) -> WideResNet:
    """WRN-22-2: 1.08 million weights."""
    return WideResNet(22, 2, **options)
