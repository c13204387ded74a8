"""Running a network for a look at it, which leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch

from growfx.masked.graph import MaskedGraph
from growfx.masked.modules import in_mode

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(net: MaskedGraph) -> Generator[None]:
    """The network in training mode; afterwards modes, buffers and global generators are as they were."""
    device = next(net.parameters()).device
    masks = {id(layer.mask) for layer in net.layers.values()}
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers() if id(buffer) not in masks]
    python, numpy, training = random.getstate(), np.random.get_state(), net.training  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []), in_mode(net.shell, net.training):
        try:
            net.train()
            yield
        finally:
            net.train(training)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
