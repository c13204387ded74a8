"""Score every edge by the paths through it."""

from growfx.passes.path_products.products import path_products

__all__ = ["path_products"]
