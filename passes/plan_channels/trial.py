"""Cut whole units out of a model that has no use for them, to see whether its code can do without."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from growfx.analysis.connectivity import Connectivity
from growfx.compaction.apply import apply_trusted, sharing_copy
from growfx.errors import ArtifactError
from growfx.passes.compact.choice import Chooser, Removal, make_plan
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
        self._example, self._hollow = example, _on_meta(model, example)
        self._chooser = Chooser(model, found, _all_dead(found))
        self.refused, self.leads = self._chooser.refused, self._chooser.leads

    def forget_values(self) -> None:
        """Drop the weights, which are not needed to cut other copies of the model."""
        self._chooser.model = meta_copy(self._chooser.model)

    def problem(self, units: WholeUnits, gone: Tensor) -> str:
        """What keeps the model's code from running when whole units leave; "" where nothing does.

        Tried on shapes alone where the model runs on these.

        Args:
            units: the whole units.
            gone: bool of every one.
        """
        model, example = self._hollow or (self._chooser.model, self._example)
        return self._run(model, example, units, gone)[1]

    def difference(self, model: nn.Module, units: WholeUnits, gone: Tensor) -> str:
        """What is wrong with the outputs when whole units leave `model`, whose weights from and to them are zero."""
        outputs, problem = self._run(model, self._example, units, gone)
        if problem:
            return problem
        error = largest_error(outputs, outputs_of(model, self._example))
        return "" if error <= _SAME else f"the outputs would differ by {error:.2g} of the largest"

    def cut(self, model: nn.Module, units: WholeUnits, gone: Tensor) -> nn.Module:
        """A copy of a model without whole units."""
        return self._without(model, self._chooser.removal(units.groups(gone))[0])

    def _without(self, model: nn.Module, removal: Removal) -> nn.Module:
        return apply_trusted(sharing_copy(model), make_plan(self._chooser, removal)[0])

    def _run(self, model: nn.Module, example: Inputs, units: WholeUnits, gone: Tensor) -> tuple[list[Tensor], str]:
        removal, back = self._chooser.removal(units.groups(gone))
        if back:
            return [], next(iter(back.values()))
        try:
            return outputs_of(self._without(model, removal), example), ""
        except ArtifactError as error:
            return [], str(error).rpartition(": ")[2]
        except Exception as error:  # whatever the model's code makes of other sizes
            return [], f"the model fails without it: {_first_line(error)}"


def _on_meta(model: nn.Module, example: Inputs) -> tuple[nn.Module, Inputs] | None:
    """The model and its inputs without values, where it runs on shapes alone."""
    try:
        hollow, shapes = meta_copy(model), example.copied(lambda tensor: tensor.to("meta"))
        outputs_of(hollow, shapes)
    except Exception:  # it reads its data
        return None
    return hollow, shapes


def _all_dead(found: Connectivity) -> Liveness:
    """Liveness of a network in which whatever leaves has no influence on what stays."""
    none = torch.zeros(len(found.group), dtype=torch.bool, device="cpu")
    sizes = {name: (len(layer.outputs), len(layer.sources)) for name, layer in found.layers.items()}
    return Liveness(
        fed=none,
        needed=none.clone(),
        varies={name: torch.zeros(width, dtype=torch.bool, device="cpu") for name, (_, width) in sizes.items()},
        constant={name: torch.zeros(width, dtype=torch.float64, device="cpu") for name, (_, width) in sizes.items()},
        edges={name: torch.zeros(1, 1, dtype=torch.bool, device="cpu").expand(size) for name, size in sizes.items()},
    )


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
