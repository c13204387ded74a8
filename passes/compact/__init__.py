"""Remove dead units and fold batch norms: the same outputs from a smaller network."""

from growfx.passes.compact.network import compact

__all__ = ["compact"]
