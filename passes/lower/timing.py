"""Which kernel of each layer is fastest, on this machine, within one run of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.recorded.inputs import Inputs
from growfx.runtime.layer_kernels import KernelRefusedError, clear_choice, make_kernel, sparse_choices
from growfx.runtime.lowered_layer import Kernel, LoweredLayer
from growfx.runtime.report import LayerLowering
from growfx.runtime.timing import interleaved_minima

__all__ = ["time_layers"]

# What a kernel must be faster by: less is noise, and torch's own needs no second copy of anything.
_MARGIN = 0.03
# No sparse kernel comes near a dense one above this.
_DENSEST = 0.6
_ROUNDS, _SECONDS = 7, 0.03


def time_layers(
    run: Callable[..., Any],
    layers: Mapping[str, LoweredLayer],
    masks: Mapping[str, Tensor],
    plain: nn.Module,
    inputs: Inputs,
    before: Mapping[str, LayerLowering] | None = None,
    spreads: list[float] | None = None,
) -> dict[str, LayerLowering]:
    """Time every kernel that each layer can have, on the inputs it gets in one run, where it is not clear before.

    Args:
        run: the network, in which all `layers` are dense.
        layers: by name.
        masks: layer -> its mask; one that has none stays dense.
        plain: the model that the layers come from, for their weights.
        inputs: of the network.
        before: what an earlier run took, under the same conditions: the least of both counts.
        spreads: gets those of every call timed, as of `growfx.runtime.timing.interleaved_minima`.
    """
    found: dict[str, LayerLowering] = {}
    # No inference mode: what a model keeps from a run (anchors, masks) it may write into later.
    with ExitStack() as stack, torch.no_grad():
        _run(run, inputs)  # a network that is not recorded yet runs its layers on other inputs, too
        for name, layer in layers.items():
            source: Any = plain.get_submodule(name)
            mask = masks.get(name)
            density = 1.0 if mask is None else float(mask.sum()) / max(mask.numel(), 1)
            found[name] = LayerLowering(name, tuple(source.weight.shape), density, reason=_untried(mask, density))
            if not found[name].reason and mask is not None:
                trial = _Trial(layer.kernel, source, mask, found, name, spreads)
                stack.callback(layer.register_forward_pre_hook(trial, with_kwargs=True).remove)
        _run(run, inputs)
    return {name: _decided(_least(facts, (before or {}).get(name))) for name, facts in found.items()}


def _least(facts: LayerLowering, before: LayerLowering | None) -> LayerLowering:
    """The least times of two runs; those of the second alone where they timed something else."""
    if before is None or before.microseconds.keys() != facts.microseconds.keys():
        return facts
    times = {choice: min(time, before.microseconds[choice]) for choice, time in facts.microseconds.items()}
    return replace(facts, microseconds=times)


def _run(run: Callable[..., Any], inputs: Inputs) -> None:
    """Run on a copy: models may write into what they are given."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (inputs.args, dict(inputs.kwargs)))
    run(*args, **kwargs)


def _untried(mask: Tensor | None, density: float) -> str:
    if mask is None:
        return "it has no mask"
    return f"its density is above {_DENSEST:.0%}" if density > _DENSEST else ""


class _Trial:
    """Times the kernels of one layer whenever it is called; kernels are made for that and forgotten."""

    def __init__(
        self,
        dense: Kernel,
        source: nn.Conv2d | nn.Linear,
        mask: Tensor,
        found: dict[str, LayerLowering],
        name: str,
        spreads: list[float] | None,
    ) -> None:
        self.dense, self.source, self.mask, self.found, self.name = dense, source, mask, found, name
        self.spreads = spreads

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        facts, shape = self.found[self.name], tuple(args[0].shape)
        if facts.input and not facts.microseconds:
            return  # clear at its first call
        clear = "" if facts.input else clear_choice(self.source, facts.density, shape)
        if clear:
            reason = f"of its size and density {'torch is' if clear == 'dense' else 'it is'} clearly the fastest"
            self.found[self.name] = replace(facts, input=facts.input or shape, choice=clear, reason=reason)
            return
        kernels, reasons = {"dense": self.dense}, []
        for choice, refusal in sparse_choices(self.source).items():
            try:
                if refusal:
                    raise KernelRefusedError(refusal)
                kernels[choice] = make_kernel(self.source, self.mask, choice)
            except KernelRefusedError as why:
                reasons.append(f"no {choice}: {why}")
        calls = {choice: _bound(kernel, args, kwargs) for choice, kernel in kernels.items()}
        times = interleaved_minima(calls, least_rounds=_ROUNDS, seconds=_SECONDS, spreads=self.spreads)
        before = facts.microseconds
        self.found[self.name] = replace(
            facts,
            input=facts.input or shape,
            microseconds={choice: before.get(choice, 0.0) + time for choice, time in times.items()},
            reason="; ".join(reasons),
        )


def _bound(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    return lambda: kernel.forward(*args, **kwargs)


def _decided(facts: LayerLowering) -> LayerLowering:
    times = facts.microseconds
    if not times:
        return replace(facts, reason=facts.reason or "it is not called on these inputs")
    best = min(times, key=lambda choice: times[choice])
    if best == "dense":
        reason = "torch's own is fastest" if len(times) > 1 else "nothing to choose from"
    elif times[best] > (1 - _MARGIN) * times["dense"]:
        best, reason = "dense", f"{best} is faster by less than {_MARGIN:.0%}"
    else:
        reason = f"{times['dense'] / times[best]:.1f}x as fast as dense"
    return replace(facts, choice=best, reason="; ".join(filter(None, (reason, facts.reason))))
