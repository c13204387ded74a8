"""What the model itself does, before anything is recorded: the inputs it takes, its outputs, the weights it uses."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from growfx.commands.zoo.facts import one_line
from growfx.commands.zoo.guest import GuestForm
from growfx.commands.zoo.inputs import Form
from growfx.commands.zoo.outputs import run_followed
from growfx.passes.record.meta_shapes import short_shapes

__all__ = ["CALLS", "Reference", "observe"]

# Check -> batch size, and whether in train mode.
CALLS = {"eval": (1, False), "train": (2, True), "other size": (3, False), "batch 3": (3, False)}


@dataclass
class Reference:
    """The model's own behaviour.

    Attributes:
        form: of its inputs, a `Form` or `GuestForm`.
        other: the same at another height and width; None where the model refuses.
        outputs: check -> outputs of the model for that call, flattened. "batch 3" is called only where three images of
            another size were not: one forward serves both.
        refusals: check -> the model's own error for that call.
        used: names of the weights that its convolutions, linear maps and attentions use, in eval and in train mode.
    """

    form: Any
    other: Any = None
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def smaller(self) -> Any:
        """The other form where it is smaller, for speed; else the model's own."""
        return self.other if self.other is not None and self.other.smaller_than(self.form) else self.form

    def call(self, model: nn.Module, check: str, form: Any, device: str) -> bool:
        """Call the model for a check; False when it refuses."""
        batch, training = CALLS[check]
        try:
            with short_shapes() if device == "meta" else contextlib.nullcontext():
                outputs, used = run_followed(model, form.inputs(batch, seed=batch, device=device), training)
        except Exception as error:
            self.refusals[check] = one_line(error)
            return False
        self.refusals.pop(check, None)
        self.outputs[check] = outputs
        self.used |= used
        return True


def observe(model: nn.Module, forms: Sequence[Form] | Sequence[GuestForm], device: str) -> Reference:
    """Call the model on the first of `forms` that it takes in both modes, else in eval mode alone.

    A real one is also called at another size, and with three images; on the meta device eval mode is all.

    Raises:
        ValueError: it takes none of them; says how it refused the first.
    """
    tried: list[Reference] = []
    for form in forms:
        found = Reference(form)
        tried.append(found)
        if found.call(model, "eval", form, device) and (device == "meta" or found.call(model, "train", form, device)):
            break
    else:
        found = next((f for f in tried if "eval" in f.outputs), tried[0])
        if "eval" not in found.outputs:
            raise ValueError(f"the model itself refuses: {found.refusals['eval']}")
    if device == "meta":
        return found
    for other in found.form.others():
        if found.call(model, "other size", other, device):
            found.other = other
            break
    if found.smaller() is found.form:
        found.call(model, "batch 3", found.form, device)
    return found
