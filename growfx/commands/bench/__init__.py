"""`growfx bench`: the speed of an artifact on this machine."""

from growfx.commands.bench.measure import bench

__all__ = ["bench"]
