"""Choose exactly k edges: by score, at random in proportion to a score, by density."""

from growfx.selection.choose import draw, top
from growfx.selection.density import random_masks
from growfx.selection.edge_keys import EdgeKeys
from growfx.selection.result import Selection

__all__ = ["EdgeKeys", "Selection", "draw", "random_masks", "top"]
