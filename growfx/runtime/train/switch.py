"""`use_kernels`: give each masked layer of a network its fastest kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from growfx.errors import ConfigError, GrowfxError, TraceError, did_you_mean
from growfx.masked.doors import as_masked_graph
from growfx.masked.graph import MaskedGraph
from growfx.masked.isolation import undisturbed
from growfx.masked.optimizers import step_ahead_by
from growfx.masked.present.storage import STORAGES, set_storage, storage_of
from growfx.recorded.inputs import Inputs
from growfx.runtime.train.choice import KERNELS, Chooser
from growfx.runtime.train.layer import LayerKernel
from growfx.runtime.train.library import training_status
from growfx.runtime.train.network import FlowPlan, NetworkKernels
from growfx.runtime.train.present_step import step_present

__all__ = ["use_kernels"]


def use_kernels(
    net: Any,
    kernels: str = "auto",
    *,
    example_inputs: Any = None,
    deterministic: bool = False,
    storage: str | None = None,
) -> MaskedGraph:
    """Let each masked layer compute by the fastest of dense-masked and sparse kernels, forward and backward, on a CPU.

    Sparse kernels compute over active entries alone: the same sums as the masked dense layer, in another order. They
    are bit-identical for any number of threads. Whatever has no sparse kernel (transposed convolutions, other
    devices and dtypes, steps that need the gradient of absent edges) takes dense kernels; `net.kernel_report` says
    what was taken and why. The kernels are compiled on first use; without a compiler all layers stay dense.

    Args:
        net: a masked network, or what `torch.compile` or a data-parallel class made of one.
        kernels: "auto" times both for each geometry, batch and density, once on this machine, and looks a layer up
            anew when its density has changed by a fifth; "sparse" takes sparse kernels wherever there is one; "dense"
            undoes it.
        example_inputs: a batch as in training, as of `growfx.wrap`, to be timed now; default: the first batch seen.
        deterministic: let "auto" choose by the density of a layer alone, as every machine and process would.
        storage: "present" keeps values, gradients and optimizer state of present edges only: the parameter of a layer
            is then `layer.values` (nnz), in the order of the mask, and `layer.weight` is built for who reads it. They
            follow every change of masks. Make the optimizer afterwards. "dense" keeps whole weights; None leaves the
            storage as it is. State dicts are the same for both. Layers whose weight the model reads without calling
            them keep it whole; the report says which.

    Returns:
        the masked network, changed in place.

    Raises:
        TraceError: the model fails on `example_inputs`; the network keeps the kernels it had.
        ConfigError: unknown `kernels` or `storage`; "sparse" for a network that is not on a CPU in float32; "present"
            for weights that are spread over processes (`fully_shard`) or computed by soft masks.

    Example:
        >>> import torch, growfx
        >>> images = torch.randn(16, 3, 8, 8)
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), images[:1], density=0.1)
        >>> growfx.use_kernels(net, example_inputs=images).kernel_report.kernels
        'auto'
    """
    found = as_masked_graph(net, "growfx.use_kernels")
    _check_known("kernels", kernels, KERNELS)
    if storage is not None:
        _check_known("storage", storage, STORAGES)
    if kernels == "sparse":
        _check_sparse(found)
    inputs = None if example_inputs is None else found.inputs_like(example_inputs)
    missing = "" if kernels == "dense" else training_status()
    chooser = None if kernels == "dense" or missing else Chooser(kernels, timed=not deterministic)
    if chooser is not None:
        step_ahead_by(step_present)
    stored = storage_of(found)
    if inputs is not None and storage not in (None, stored):
        _time(found, inputs)  # parameters are exchanged for a model that runs on the inputs only
    whole = set_storage(found, storage or stored)
    before = found.kernels, {name: layer.kernel for name, layer in found.layers.items()}
    plan = FlowPlan() if chooser is None else FlowPlan.of(found)
    for name, layer in found.layers.items():
        layer.kernel = None if chooser is None else LayerKernel(name, layer, chooser, readers=plan.rows.get(name))
    found.kernels = NetworkKernels(chooser, plan, missing, whole)
    if inputs is not None and chooser is not None:
        try:
            _time(found, inputs)
        except BaseException:
            found.kernels = before[0]
            for name, layer in found.layers.items():
                layer.kernel = before[1][name]
            raise
    return found


def _check_known(option: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        listed = ", ".join(f"`{name}`" for name in allowed)
        raise ConfigError(f"`{option}` = {value!r} is unknown; allowed: {listed}{did_you_mean(value, allowed)}")


def _time(net: MaskedGraph, inputs: Inputs) -> None:
    try:
        with undisturbed(net), torch.enable_grad():
            net(*inputs.args, **inputs.kwargs)
    except GrowfxError:
        raise
    except Exception as error:
        shapes = [tuple(value.shape) for value in inputs.values if isinstance(value, torch.Tensor)]
        raise TraceError(
            f"`{type(net.shell).__name__}` fails on `example_inputs` of shape {shapes}: {type(error).__name__}: {error}"
            ". Pass inputs that the model accepts"
        ) from error


def _check_sparse(net: MaskedGraph) -> None:
    for name, layer in net.layers.items():
        weight = layer.trained
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise ConfigError(
                f"`kernels` = `sparse` needs weights in torch.float32 on a CPU, those of `{name}` are {weight.dtype} "
                f"on {weight.device}; use `auto`, or move and convert the network first"
            )
