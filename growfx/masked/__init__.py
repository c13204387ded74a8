"""The masked network: layers, gradients, optimizer hooks, the graph and its inputs."""

from growfx.masked.graph import MaskedGraph
from growfx.masked.layers import MaskedLayer

__all__ = ["MaskedGraph", "MaskedLayer"]
