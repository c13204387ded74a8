"""The masked network: the model's face, its masked layers, its recordings, what it knows of other ranks."""

from growfx.masked.graph.network import MaskedGraph

__all__ = ["MaskedGraph"]
