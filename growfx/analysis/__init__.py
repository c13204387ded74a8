"""What passes find out about a network, as plain facts: paths, connectivity, cost."""

from growfx.analysis.connectivity import Connectivity
from growfx.analysis.cost import CostMeter, forward_cost
from growfx.analysis.paths import PathProducts

__all__ = ["Connectivity", "CostMeter", "PathProducts", "forward_cost"]
