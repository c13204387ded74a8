"""The result of a pass that returns a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

__all__ = ["PassResult"]

Report = TypeVar("Report", covariant=True)


@dataclass(frozen=True)
class PassResult(Generic[Report]):
    """A network that gives the outputs of the one that a pass was given, compared by `trials.difference`.

    It prints as its report.

    Attributes:
        net: the network, in evaluation mode.
        modified: whether anything in it is other than before.
        report: what was done, and why the rest stays.
    """

    net: nn.Module
    modified: bool
    report: Report

    @property
    def model(self) -> nn.Module:
        """The network, a plain model: `net`."""
        return self.net

    def __str__(self) -> str:
        return str(self.report)
