"""Run a network by the native runtime: planned, compared with the model, and timed against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from growfx.errors import GrowfxError
from growfx.masked.twins import masks_by_parameter
from growfx.passes.lower.plan import plan_run
from growfx.passes.trials.comparison import Trial, difference, with_rows
from growfx.passes.trials.precision import outputs_of, tolerance_of
from growfx.recorded.inputs import Inputs
from growfx.recorded.recording import RecordedGraph
from growfx.runtime.native.library import library_status
from growfx.runtime.native.run import FAILED, UNSERVED, NetworkRun

__all__ = ["PlannedModel", "plan_native"]


class PlannedModel(nn.Module):
    """A run of a whole network as a module, for inputs that it computes."""

    def __init__(self, run: NetworkRun) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network computes.

        Raises:
            RuntimeError: it does not compute these inputs.
        """
        made = self.run(args, kwargs)
        if made is UNSERVED or made is FAILED:
            raise RuntimeError("the native runtime does not compute these inputs")
        return made


def plan_native(
    plain: nn.Module, recording: RecordedGraph, masks: Mapping[str, Tensor], inputs: Inputs
) -> tuple[NetworkRun | None, str]:
    """A run whose outputs are those of the model, and how far they differ; or None, and why there is none.

    Args:
        plain: the model, in float32 on the CPU.
        recording: of it, for these inputs.
        masks: by layer or parameter.
        inputs: to plan for and to compare on.
    """
    refusal = library_status()
    if not refusal and (not recording.batch_is_free or recording.holds_for_values):
        refusal = "the network was recorded for one batch size, or for values that it takes out of its inputs"
    if refusal:
        return None, refusal
    parameters = {name for name, _ in plain.named_parameters(remove_duplicate=False)}
    stored = {name: mask for name, mask in masks_by_parameter(plain, masks).items() if name in parameters}
    try:
        run = plan_run(plain, stored, inputs)
        error, problem = difference(PlannedModel(run), _trials(plain, inputs))
    except GrowfxError as why:
        return None, str(why)
    except Exception as why:  # of any model, which runs here as torch traces it
        first = (str(why).strip().splitlines() or [""])[0]
        return None, f"its operators cannot be recorded ({type(why).__name__}: {first})"
    if problem:
        return None, problem
    return run, f"outputs differ from the plain network's by {error:.1e} of the largest"


def _trials(plain: nn.Module, inputs: Inputs) -> Sequence[Trial]:
    """The inputs, and others with another batch size."""
    others = with_rows(inputs, 2 if inputs.batch == 1 else 1).redrawn(1)
    trials: list[Trial] = []
    for given in (inputs, others):
        outputs = outputs_of(plain, given)
        tolerances = [tolerance_of(output.dtype, reordered=True) for output in outputs]
        trials.append(Trial(given, outputs, tolerances, wide=False))
    return trials
