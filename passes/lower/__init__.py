"""Replace layers by sparse kernels where they are faster."""

from growfx.passes.lower.layers import lower

__all__ = ["lower"]
