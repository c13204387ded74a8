"""Swap maskable layers for masked ones: `growfx.wrap`, and `growfx.unwrap` back."""

from growfx.passes.mask.swap import unwrap, wrap

__all__ = ["unwrap", "wrap"]
