"""`growfx.train`: the loop, its recipe and its checkpoints."""

from growfx.training.start import train

__all__ = ["train"]
