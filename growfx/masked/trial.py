"""Running a network for a look at it, which leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from growfx.masked.graph import MaskedGraph
from growfx.masked.modules import in_mode

__all__ = ["undisturbed", "unused_parameters"]


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


def unused_parameters(net: MaskedGraph) -> list[str]:
    """Names of the parameters to be trained that the class scores, the network's first output, do not depend on.

    By one forward in training mode, on inputs as recorded.
    """
    with undisturbed(net), torch.enable_grad():
        example = net.example(2)
        found = pytree.tree_leaves(net(*example.args, **example.kwargs))
    outputs = [value for value in found if isinstance(value, torch.Tensor)]
    reached = _leaves(outputs[0]) if outputs else set[int]()
    return [name for name, value in net.named_parameters() if value.requires_grad and id(value) not in reached]


def _leaves(output: torch.Tensor) -> set[int]:
    """Ids of the tensors that gradients of `output` arrive at."""
    found, seen, waiting = set[int](), set[object](), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # only nodes that accumulate a gradient have one
        if isinstance(leaf, nn.Parameter):
            found.add(id(leaf))
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return found
