"""Plan a network for the native runtime."""

from growfx.passes.lower.plan.network import missing_kernels, plan_network, unknown_operators

__all__ = ["missing_kernels", "plan_network", "unknown_operators"]
