"""Which whole units leave a network to meet a budget."""

from growfx.passes.plan_channels.planning import plan_channels

__all__ = ["plan_channels"]
