"""Plan a network for the native runtime."""

from growfx.passes.lower.plan.network import missing_kernels, plan_network, unknown_operators
from growfx.passes.lower.plan.split import plan_run

__all__ = ["missing_kernels", "plan_network", "plan_run", "unknown_operators"]
