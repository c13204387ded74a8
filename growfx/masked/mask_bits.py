"""Masks as packed bits, eight edges a byte, for checkpoints and snapshots."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack", "unpack"]


def pack(mask: Tensor) -> Tensor:
    """Return the bits of a bool mask as a flat uint8 tensor on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().reshape(-1).numpy()))


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """Return the mask that `pack` packed, in the shape and on the device of `like`."""
    flat = np.unpackbits(bits.cpu().numpy(), count=like.numel()).astype(bool)
    return torch.from_numpy(flat).reshape(like.shape).to(like.device)
