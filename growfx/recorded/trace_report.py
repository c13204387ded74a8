"""What wrapping a model found: which layers are masked, which are not and why, and whether the recording is true."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["TraceReport"]


@dataclass
class TraceReport:
    """The account of one `growfx.wrap`; prints as a table.

    Attributes:
        layers: names of the masked layers, in data-flow order.
        opaque: modules recorded whole, as one operator -> the reason. "" is the model itself: there is no graph of it
            that holds for other inputs.
        unmasked: convolutions, linear layers, attentions, and parameters that the forward reads like a matrix, without
            a mask -> the reason.
        tied: layers that share the weight, and so the mask, of another one -> that one's name.
        faithful: the recorded graph gave the model's own outputs, in eval and train mode, at a second batch size, and
            its gradients where operators do not tell them.
        side_effects: what the forward does besides returning a value ("assigns `block.state`"); the net does it as the
            model does, a graph does not.
        branches: values that the forward reads from its data and that the recorded graph holds for alone, with the line
            that reads them; the graph checks them when it runs, and passes record it anew for inputs with others.
        notes: anything else worth knowing, one sentence each.
    """

    layers: list[str] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    unmasked: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    faithful: bool = False
    side_effects: list[str] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, state, reason) for every layer and opaque module."""
        rows = [(name, "masked", "") for name in self.layers]
        rows += [(name, "masked", f"shares the weight of `{other}`") for name, other in self.tied.items()]
        rows += [(name, "unmasked", reason) for name, reason in self.unmasked.items()]
        rows += [(name or "(the model)", "opaque", reason) for name, reason in self.opaque.items()]
        return rows

    def __str__(self) -> str:
        from tabulate import tabulate

        verdict = "equal to the model" if self.faithful else "not equal to the model; no pass works on it"
        lines = [
            tabulate(self.rows(), headers=["layer", "state", "reason"]),
            f"recorded graph: {verdict}",
            *(f"the forward {effect}" for effect in self.side_effects),
            *(f"branches on values: {branch}" for branch in self.branches),
            *self.notes,
        ]
        return "\n".join(lines)
