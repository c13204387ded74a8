"""Which units of a layer feed which units of another."""

from growfx.passes.connect.interpreter import connect

__all__ = ["connect"]
