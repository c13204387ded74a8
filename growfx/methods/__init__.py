"""Methods by name: `create("pwmpr", growth_ratio=1.3)`.

A method's options are the init fields of its frozen dataclass; their ranges stand beside them.
"""

from growfx.methods.base import Method
from growfx.methods.registry import create, kind_of, names

__all__ = ["Method", "create", "kind_of", "names"]
