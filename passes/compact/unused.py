"""What a model has for training alone: modules that evaluation never runs, such as auxiliary heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, fx, nn

from growfx.analysis.connectivity import Connectivity
from growfx.compaction.apply import apply_plan, sharing_copy
from growfx.compaction.plan import CompactionPlan
from growfx.passes.trials.comparison import Trial, difference
from growfx.passes.trials.precision import outputs_of

__all__ = ["find_unused"]


def find_unused(
    model: nn.Module, graph: fx.Graph, found: Connectivity, opaque: Iterable[str], trials: Sequence[Trial]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Modules with parameters that evaluation can do without, and why others that it never reads stay.

    Args:
        model: the plain model in evaluation mode.
        graph: its recorded graph in that mode.
        found: its connectivity; what is in it is used.
        opaque: modules that were recorded whole, whose code may look at data.
        trials: inputs and outputs that must stay.

    Returns:
        Names of modules that can leave, none of them in another, and module or parameter -> reason.
    """
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    used |= {*found.layers, *found.parameters} | _called(model, trials)
    unread = _unread(model, used)
    stays = {name: reason for name in unread if (reason := _refusal(model, name, opaque))}
    chosen = tuple(name for name in unread if name not in stays)
    wrong = _problem(model, chosen, trials)
    if wrong:
        kept: tuple[str, ...] = ()
        for name in chosen:
            if problem := _problem(model, (*kept, name), trials):
                stays[name] = problem
            else:
                kept = (*kept, name)
        chosen = kept
    return chosen, stays


def _called(model: nn.Module, trials: Sequence[Trial]) -> set[str]:
    """All modules that run on the trials."""
    called: set[str] = set()
    with ExitStack() as stack:
        for name, module in model.named_modules(remove_duplicate=False):

            def note(_: nn.Module, args: Any, name: str = name) -> None:
                called.add(name)

            stack.callback(module.register_forward_pre_hook(note).remove)
        for trial in trials:
            outputs_of(model, trial.inputs, trial.wide)
    return called


def _unread(model: nn.Module, used: set[str]) -> list[str]:
    """The largest modules of which nothing was used, and parameters of modules that are their own only."""
    ways = {name[:end] for name in used for end in _ends(name)}
    result: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{other}.") for other in result)
        if name and name not in ways and not inside and next(module.parameters(), None) is not None:
            result.append(name)
    return result


def _ends(name: str) -> list[int]:
    return [i for i, letter in enumerate(name) if letter == "."] + [len(name)]


def _refusal(model: nn.Module, name: str, opaque: Iterable[str]) -> str:
    """Why a module that did not run must stay; "" where nothing says so."""
    whole = next((part for part in opaque if not part or name == part or name.startswith(f"{part}.")), None)
    if whole is not None:
        return f"`{whole or type(model).__name__}` was recorded whole, and may run it on other inputs"
    inside: Mapping[int, Tensor] = {id(t): t for t in model.get_submodule(name).parameters()}
    for other, tensor in model.named_parameters(remove_duplicate=False):
        if id(tensor) in inside and not other.startswith(f"{name}."):
            return f"it shares `{other}`"
    return ""


def _problem(model: nn.Module, names: tuple[str, ...], trials: Sequence[Trial]) -> str:
    return difference(apply_plan(sharing_copy(model), CompactionPlan(left_out=names)), trials)[1] if names else ""
