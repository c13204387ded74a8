"""Cut whole units out of a model that has no use for them, to see whether its code can do without."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.analysis.connectivity import Connectivity
from growfx.compaction.apply import apply_plan, sharing_copy
from growfx.errors import ArtifactError
from growfx.passes.compact.choice import Chooser, make_plan
from growfx.passes.compact.liveness import Liveness
from growfx.passes.plan_channels.units import WholeUnits
from growfx.passes.record.recording import meta_copy
from growfx.passes.trials.precision import largest_error, outputs_of
from growfx.recorded.inputs import Inputs

__all__ = ["Cutter"]

# A wrong cut is off by about the outputs themselves; deep networks of random weights enlarge roundings.
_SAME = 1e-2


class Cutter:
    """Removes whole units as compaction will once their weights are zero.

    Attributes:
        refused: group -> why it may not leave, whatever its weights.
        leads: layer -> the group that feeds every column, 0 for none.
    """

    def __init__(self, model: nn.Module, found: Connectivity, example: Inputs) -> None:
        self._model, self._example = model, example
        self._chooser = Chooser(model, found, _all_dead(found))
        self.refused, self.leads = self._chooser.refused, self._chooser.leads
        self._hollow: nn.Module | None = meta_copy(model)
        self._shapes: list[torch.Size] = []
        try:
            self._shapes = [value.shape for value in outputs_of(self._hollow, _on_meta(example))]
        except Exception:  # it reads its data
            self._hollow = None

    def forget_values(self) -> None:
        """Drop the weights, and the copy without values, which are not needed to cut other copies of the model."""
        self._chooser.model, self._hollow = meta_copy(self._chooser.model), None

    def problem(self, units: WholeUnits, gone: Tensor) -> str:
        """What is wrong, by shapes alone, when whole units leave; "" where nothing is or nothing can be said.

        `gone`: bool of every whole unit.
        """
        groups = units.groups(gone)
        removal, back = self._chooser.removal(list(groups))
        if back:
            return next(iter(back.values()))
        if self._hollow is None:
            return ""
        try:
            small = apply_plan(sharing_copy(self._hollow), make_plan(self._chooser, removal)[0])
            shapes = [value.shape for value in outputs_of(small, _on_meta(self._example))]
        except ArtifactError as error:
            return str(error).rpartition(": ")[2]
        except Exception as error:  # whatever the model's code makes of other sizes
            return f"the model fails without it: {_first_line(error)}"
        return "" if shapes == self._shapes else "the outputs would have another shape"

    def cut(self, model: nn.Module, units: WholeUnits, gone: Tensor) -> nn.Module:
        """A copy of a model without whole units."""
        removal, _ = self._chooser.removal(units.groups(gone))
        return apply_plan(sharing_copy(model), make_plan(self._chooser, removal)[0])

    def difference(self, model: nn.Module, units: WholeUnits, gone: Tensor, inputs: Inputs) -> str:
        """What is wrong with the values when whole units leave `model`, whose weights from and to them are zero."""
        back = self._chooser.removal(units.groups(gone))[1]
        if back:
            return next(iter(back.values()))
        try:
            small = self.cut(model, units, gone)
            error = largest_error(outputs_of(small, inputs), outputs_of(model, inputs))
        except ArtifactError as error:
            return str(error).rpartition(": ")[2]
        except Exception as error:
            return f"the model fails without it: {_first_line(error)}"
        return "" if error <= _SAME else f"the outputs would differ by {error:.2g} of the largest"


def _all_dead(found: Connectivity) -> Liveness:
    """Liveness of a network in which whatever leaves has no influence on what stays."""
    none = torch.zeros(len(found.group), dtype=torch.bool)
    sizes = {name: (len(layer.outputs), len(layer.sources)) for name, layer in found.layers.items()}
    return Liveness(
        fed=none,
        needed=none.clone(),
        varies={name: torch.zeros(width, dtype=torch.bool) for name, (_, width) in sizes.items()},
        constant={name: torch.zeros(width, dtype=torch.float64) for name, (_, width) in sizes.items()},
        edges={name: torch.zeros(1, 1, dtype=torch.bool).expand(size) for name, size in sizes.items()},
    )


def _on_meta(inputs: Inputs) -> Inputs:
    move = lambda v: v.to("meta") if isinstance(v, Tensor) else v  # noqa: E731
    return Inputs(*pytree.tree_map(move, (inputs.args, dict(inputs.kwargs))))


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
