"""Which kernel of each layer is fastest, on this machine, within one run of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from growfx.inputs import Inputs
from growfx.layer_kernels import KernelRefusedError, make_kernel, sparse_choices
from growfx.lowered_layer import Kernel, LoweredLayer
from growfx.lowering_report import LayerLowering
from growfx.timing import interleaved_minima

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
) -> dict[str, LayerLowering]:
    """Time every kernel that each layer can have, on the inputs it gets in one run.

    Args:
        run: the network, in which all `layers` are dense.
        layers: by name.
        masks: layer -> its mask; one that has none stays dense.
        plain: the model that the layers come from, for their weights.
        inputs: of the network.
    """
    found: dict[str, LayerLowering] = {}
    with ExitStack() as stack, torch.inference_mode():
        run(*inputs.args, **inputs.kwargs)  # a network that is not recorded yet runs its layers on other inputs, too
        for name, layer in layers.items():
            source: Any = plain.get_submodule(name)
            mask = masks.get(name)
            density = 1.0 if mask is None else float(mask.sum()) / max(mask.numel(), 1)
            found[name] = LayerLowering(name, tuple(source.weight.shape), density, reason=_untried(mask, density))
            if not found[name].reason and mask is not None:
                trial = _Trial(layer.kernel, source, mask, found, name)
                stack.callback(layer.register_forward_pre_hook(trial, with_kwargs=True).remove)
        run(*inputs.args, **inputs.kwargs)
    return {name: _decided(facts) for name, facts in found.items()}


def _untried(mask: Tensor | None, density: float) -> str:
    if mask is None:
        return "it has no mask"
    return f"its density is above {_DENSEST:.0%}" if density > _DENSEST else ""


class _Trial:
    """Times the kernels of one layer whenever it is called; kernels are made for that and forgotten."""

    def __init__(
        self, dense: Kernel, source: nn.Conv2d | nn.Linear, mask: Tensor, found: dict[str, LayerLowering], name: str
    ) -> None:
        self.dense, self.source, self.mask, self.found, self.name = dense, source, mask, found, name

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kernels, reasons = {"dense": self.dense}, []
        for choice, refusal in sparse_choices(self.source).items():
            try:
                if refusal:
                    raise KernelRefusedError(refusal)
                kernels[choice] = make_kernel(self.source, self.mask, choice)
            except KernelRefusedError as why:
                reasons.append(f"no {choice}: {why}")
        calls = {choice: _bound(kernel, args, kwargs) for choice, kernel in kernels.items()}
        times = interleaved_minima(calls, least_rounds=_ROUNDS, seconds=_SECONDS)
        facts = self.found[self.name]
        before = facts.microseconds
        self.found[self.name] = replace(
            facts,
            input=facts.input or tuple(args[0].shape),
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
