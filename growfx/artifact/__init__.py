"""The artifact: sparse weights and a manifest, as bytes on disk."""

from growfx.artifact.arrays import to_numpy, to_scipy
from growfx.artifact.reader import inspect, load_masks, load_state

__all__ = ["inspect", "load_masks", "load_state", "to_numpy", "to_scipy"]
