"""A network on volumes with window attention, and how much memory is asked for at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SIZE, WINDOW = 24, 4


class Attention(nn.Module):
    """Attention in windows of WINDOW ** 3 places."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, c, d, h, w = x.shape
        n = WINDOW
        y = x.view(b, c, d // n, n, h // n, n, w // n, n).permute(0, 2, 4, 6, 3, 5, 7, 1)
        y = self.norm(y.reshape(-1, n**3, c))
        q, k, v = self.qkv(y).reshape(-1, n**3, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, n**3, c))
        y = y.view(b, d // n, h // n, w // n, n, n, n, c).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x + y.reshape(b, c, d, h, w)


class VolumeNet(nn.Module):
    """Down, attention, up, and a skip at full size: the shape of networks that segment volumes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, width, 3, padding=1), nn.InstanceNorm3d(width, affine=True), nn.ReLU())
        self.down = nn.Conv3d(1, 2 * width, 2, stride=2)
        self.attention = Attention(2 * width, 4)
        self.up = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        self.join = nn.Sequential(nn.Conv3d(2 * width, width, 3, padding=1), nn.ReLU())
        self.last = nn.Conv3d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.join(torch.cat([self.up(self.attention(self.down(x))), self.stem(x)], 1)))


class LargestResult(TorchDispatchMode):
    """Notes the most that one operator takes: what it returns, and the columns that a convolution in float64 unfolds.

    Attributes:
        bytes: in bytes.
        operator: its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operator = 0, ""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        stored = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and not t.is_meta]
        size = 0 if func.is_view else sum({t.data_ptr(): t.untyped_storage().nbytes() for t in stored}.values())
        if func is torch.ops.aten.convolution.default and args[0].dtype == torch.float64 and not args[0].is_meta:
            x, weight, transposed = args[0], args[1], args[6]
            places = x.shape[2:] if transposed else result.shape[2:]
            size += len(x) * weight[0].numel() * places.numel() * 8
        if size > self.bytes:
            self.bytes, self.operator = size, str(func)
        return result
