"""The kernels of a whole network: how its forward runs, and the report."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from growfx.errors import TraceError
from growfx.masked.graph import MaskedGraph
from growfx.runtime.train.chains import Chain, chains_of
from growfx.runtime.train.choice import Chooser
from growfx.runtime.train.flow import Flow
from growfx.runtime.train.layer import LayerKernel
from growfx.runtime.train.report import KernelReport, LayerChoice
from growfx.runtime.train.rows import rows_kept

__all__ = ["FlowPlan", "NetworkKernels", "choices_of", "dense_meanwhile", "kernels_taken", "take_choices"]

# Of all modules, whatever network they belong to.
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


@dataclass(frozen=True)
class FlowPlan:
    """What of a network can be computed in the layout of the kernels, by its recording in train mode.

    Attributes:
        chains: what follows each batch norm, by the id of its weight.
        rows: linear layers whose outputs may stay as their kernels leave them -> the linear layers that read these.
        images: whether there are batch norms, without which images gain nothing.
    """

    chains: Mapping[int, Chain] = field(default_factory=dict)
    rows: Mapping[str, frozenset[str]] = field(default_factory=dict)
    images: bool = False

    @classmethod
    def of(cls, net: MaskedGraph) -> FlowPlan:
        """The plan of a network; of chains and rows, what the recording is sure of."""
        images = any(isinstance(module, _BatchNorm) for module in net.modules())
        try:
            recording = net.recording(net.example(), training=True)
        except TraceError:
            return cls(images=images)
        if not recording.faithful or recording.own_gradient:
            return cls(images=images)
        found = chains_of(recording.graph, net.shell)
        modules = dict(net.shell.named_modules(remove_duplicate=False))
        weights = [module.weight for module in modules.values() if isinstance(module, _BatchNorm)]
        once = {id(weight) for weight in weights if sum(other is weight for other in weights) == 1}
        chains = {id(modules[name].weight): chain for name, chain in found.items()}
        linear = {name for name, layer in net.layers.items() if isinstance(layer, nn.Linear) and layer.calls_kernel}
        return cls(
            {key: chain for key, chain in chains.items() if key in once},
            # What a model keeps is not to be found in another layout later.
            {} if net.trace_report.side_effects else rows_kept(recording.graph, net.shell, linear),
            images,
        )


class NetworkKernels:
    """The kernels that `use_kernels` gave a network.

    Attributes:
        chooser: what chooses between dense and sparse kernels, with the table of times; None where all are dense.
        plan: what of the network may be computed in the layout of the kernels.
        missing: why there are no sparse kernels on this machine; "" where there are.
        whole: layer -> why its weight stays whole where others keep values of present edges only.
    """

    def __init__(
        self, chooser: Chooser | None, plan: FlowPlan, missing: str = "", whole: Mapping[str, str] | None = None
    ) -> None:
        self.chooser, self.plan, self.missing, self.whole = chooser, plan, missing, dict(whole or {})

    def run(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """What `model` returns: its own forward, with activations kept innermost by batch where that is faster."""
        chooser, plan = self.chooser, self.plan
        if chooser is None or not (plan.images or plan.rows):
            return model(*args, **kwargs)
        images = plan.images and (chooser.kernels != "auto" or chooser.flow_pays())
        # A flow costs each call of torch a few microseconds: none without a layer that gains by it.
        if not (images or (plan.rows and chooser.rows_pay(plan.rows))) or self._reason_of_call(model):
            return model(*args, **kwargs)
        # The chains were recorded in training; a forward may do something else in evaluation.
        flow = Flow(plan.chains if model.training else {}, images=images)
        found = flow.run(model, args, kwargs)
        if images:
            chooser.note_flow(flow.turned, flow.calls)
        return found

    def _reason_of_call(self, model: nn.Module) -> str:
        """Why this call keeps torch's layout; "" where it need not."""
        if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
            return "a transform or dispatch mode is active"
        if forward_ad._current_level >= 0:
            return "a forward derivative is wanted"
        if any(_GLOBAL_HOOKS):
            return "modules have hooks"
        for module in model.modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return "modules have hooks"
            if module._backward_hooks or module._backward_pre_hooks:
                return "modules have hooks"
        return ""

    def report(self, net: MaskedGraph) -> KernelReport:
        """What the layers of `net` take, as of their last calls."""
        kernels = "dense" if self.chooser is None else self.chooser.kernels
        notes = (f"there are no sparse kernels: {self.missing}",) if self.missing else ()
        storage = "present" if any(layer.present is not None for layer in net.layers.values()) else "dense"
        if storage == "present":
            notes += tuple(f"`{name}` keeps its whole weight: {why}" for name, why in self.whole.items())
        return KernelReport(
            kernels, {name: self._choice(name, layer) for name, layer in net.layers.items()}, notes, storage
        )

    def _choice(self, name: str, layer: Any) -> LayerChoice:
        kernel = layer.kernel
        if not isinstance(kernel, LayerKernel) or self.chooser is None:
            reason = "there is no sparse kernel" if self.missing else "asked for"
            return LayerChoice("dense", reason, None, None, layer.density)
        times = self.chooser.last_times(name)
        took = "sparse" if kernel.took_sparse else "dense"
        if times is None:
            return LayerChoice(took, kernel.reason, None, None, layer.density)
        return LayerChoice(took, kernel.reason, times.dense, times.sparse, layer.density)


def choices_of(net: MaskedGraph) -> dict[str, Any] | None:
    """What the kernels of a network were chosen by, as plain values; None without a choice."""
    chooser = None if net.kernels is None else net.kernels.chooser
    return None if chooser is None else chooser.state_dict()


def take_choices(net: MaskedGraph, state: Mapping[str, Any] | None) -> None:
    """Choose as a network did that `choices_of` was asked of; nothing where there are no kernels to choose among."""
    if state is not None and net.kernels is not None and net.kernels.chooser is not None:
        net.kernels.chooser.load_state_dict(state)


def kernels_taken(net: MaskedGraph) -> dict[str, Any]:
    """What the layers of a network took in their last calls: `asked`, numbers of `sparse` and `dense`, and `layers`."""
    report = net.kernel_report
    if report is None:
        layers = dict.fromkeys(net.layers, "dense")
        return {"asked": "dense", "sparse": 0, "dense": len(layers), "layers": layers}
    layers = {name: choice.kernel for name, choice in report.layers.items()}
    taken = list(layers.values())
    return {"asked": report.kernels, **{kind: taken.count(kind) for kind in ("sparse", "dense")}, "layers": layers}


@contextmanager
def dense_meanwhile(net: MaskedGraph) -> Generator[None]:
    """Compute by dense kernels in this block, as a network does that is loaded from its artifact: the same bits."""
    kernels, layers = net.kernels, {name: layer.kernel for name, layer in net.layers.items()}
    net.kernels = None
    for layer in net.layers.values():
        layer.kernel = None
    try:
        yield
    finally:
        net.kernels = kernels
        for name, layer in net.layers.items():
            layer.kernel = layers[name]
