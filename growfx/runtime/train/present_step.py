"""Optimizer steps over present edges alone: of torch's SGD, Adam and AdamW, for layers with sparse kernels.

Values, gradients and state of the present edges are gathered, stepped by torch's own single-tensor functions and put
back, so every bit is that of the same optimizer with `foreach=False, fused=False`. What is absent is zero everywhere
and stays so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from growfx.masked.layers import MaskedLayer
from growfx.runtime.train.layer import LayerKernel

__all__ = ["step_present"]

# Above this density a pass over all weights is faster than to gather and to put back.
_MOST = 0.4
_ELSEWHERE = ("foreach", "fused", "capturable", "differentiable")


def step_present(optimizer: Optimizer, layers: Sequence[MaskedLayer]) -> list[nn.Parameter]:
    """Step the parameters of `layers` that can be stepped over present edges alone.

    Returns:
        those parameters, whose step is done; the optimizer is to leave them out.
    """
    kind = type(optimizer)
    if kind not in (SGD, Adam, AdamW) or any(name in vars(optimizer) for name in ("grad_scale", "found_inf")):
        return []
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    done = []
    for layer in layers:
        if layer.present is not None:
            continue  # the optimizer's own step is of present edges alone
        parameter = layer.parameter
        group, index = groups[id(parameter)], _index(layer)
        if index is None or any(group.get(name) for name in _ELSEWHERE):
            continue
        if kind is SGD:
            if not _step_sgd(optimizer, parameter, group, index):
                continue
        elif not _step_adam(optimizer, parameter, group, index):
            continue
        done.append(parameter)
    return done


def _index(layer: MaskedLayer) -> Tensor | None:
    """Where the present edges lie in the parameter's memory; None where the step is torch's."""
    kernel, parameter = layer.kernel, layer.parameter
    gradient = parameter.grad
    if not isinstance(kernel, LayerKernel) or not kernel.took_sparse or gradient is None:
        return None
    alike = gradient.layout == torch.strided and gradient.dtype == parameter.dtype == torch.float32
    if not alike or gradient.stride() != parameter.stride() or type(gradient) is not Tensor:
        return None
    entries = kernel.entries_of(layer)
    return entries.places if entries is not None and entries.nnz < _MOST * layer.numel else None


def _gather(tensor: Tensor, index: Tensor) -> Tensor:
    found: Tensor = torch.ops.growfx.gather_entries(tensor.detach(), index)
    return found


def _put(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    torch.ops.growfx.put_entries(tensor.detach(), index, values)
    torch.autograd.graph.increment_version(tensor)


def _step_sgd(optimizer: Optimizer, parameter: nn.Parameter, group: dict[str, Any], index: Tensor) -> bool:
    momentum = group["momentum"]
    buffer = optimizer.state[parameter].get("momentum_buffer") if momentum != 0 else None
    if buffer is not None and not _lies_alike(buffer, parameter):
        return False
    values, gradient = _gather(parameter, index), _gather(_gradient(parameter), index)
    buffers = [None if buffer is None else _gather(buffer, index)]
    names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
    sgd([values], [gradient], buffers, foreach=False, fused=False, **{name: group[name] for name in names})
    _put(parameter, index, values)
    if momentum != 0 and buffers[0] is not None:
        if buffer is None:
            buffer = optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter).detach()
        _put(buffer, index, buffers[0])
    return True


def _step_adam(optimizer: Optimizer, parameter: nn.Parameter, group: dict[str, Any], index: Tensor) -> bool:
    if "decoupled_weight_decay" not in group:
        return False
    state = optimizer.state[parameter]
    moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float64 if torch.get_default_dtype() == torch.float64 else None)
        for name in moments:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
    if not all(_lies_alike(state[name], parameter) for name in moments):
        return False
    values, gradient = _gather(parameter, index), _gather(_gradient(parameter), index)
    gathered = {name: [_gather(state[name], index)] for name in moments}
    names = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "decoupled_weight_decay")
    adam(
        *([values], [gradient], gathered["exp_avg"], gathered["exp_avg_sq"], gathered.get("max_exp_avg_sq", [])),
        [state["step"]],
        foreach=False,
        fused=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        **{name: group[name] for name in names},
    )
    _put(parameter, index, values)
    for name in moments:
        _put(state[name], index, gathered[name][0])
    return True


def _lies_alike(state: Tensor, parameter: nn.Parameter) -> bool:
    """Whether the entries of `state` lie in memory where those of `parameter` do, in the same dtype."""
    alike = type(state) is Tensor and state.layout == torch.strided and state.dtype == parameter.dtype
    return alike and state.is_cpu and state.stride() == parameter.stride()


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
