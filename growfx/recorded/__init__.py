"""A recorded network as data: the graph in use, the operators written into it, its inputs and the report about it."""

from growfx.recorded.inputs import Inputs
from growfx.recorded.recording import RecordedGraph
from growfx.recorded.trace_report import TraceReport

__all__ = ["Inputs", "RecordedGraph", "TraceReport"]
