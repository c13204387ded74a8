"""Copy masks into torch's averages of a network, which averages all buffers as numbers when it is told to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn, get_swa_multi_avg_fn

from growfx.masked.layers import MaskedLayer
from growfx.masked.present.exchange import whole_layers

__all__ = ["copy_masks_into_averages"]

_update_parameters = AveragedModel.update_parameters


@functools.wraps(_update_parameters)
def _updated(self: AveragedModel, model: nn.Module) -> None:
    """`AveragedModel.update_parameters`; masks, which have no mean, are those of the model of now."""
    averages: Any = self
    for part in averages.module.modules():
        if "_shell" in part.__dict__:
            part.averaged = True
    with whole_layers(part for part in model.modules() if isinstance(part, MaskedLayer)):
        if not averages.use_buffers or not _is_masked(averages.module):
            _update_parameters(self, model)
            return
        with _flags_copied(averages):
            _update_parameters(self, model)


def _is_masked(module: nn.Module) -> bool:
    return any(isinstance(part, MaskedLayer) or "_shell" in part.__dict__ for part in module.modules())


@contextmanager
def _flags_copied(averages: Any) -> Generator[None]:
    """Let the average's function see numbers only: bool tensors are copied."""
    before = averages.avg_fn, averages.multi_avg_fn
    if averages.multi_avg_fn is None and averages.avg_fn is not None:
        averages.avg_fn = _one_by_one(averages.avg_fn)
    else:
        averages.multi_avg_fn = _many(averages.multi_avg_fn)
    try:
        yield
    finally:
        averages.avg_fn, averages.multi_avg_fn = before


def _one_by_one(average: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def of(averaged: Tensor, current: Tensor, count: Any) -> Tensor:
        return current if averaged.dtype == torch.bool else average(averaged, current, count)

    return of


def _many(average: Callable[..., None] | None) -> Callable[..., None]:
    """`average`, None for the mean, over tensors that come by type."""
    of_many, of_one = average or get_swa_multi_avg_fn(), get_swa_avg_fn()

    @torch.no_grad()
    def of(averaged: list[Tensor], current: list[Tensor], count: Any) -> None:
        if averaged[0].dtype == torch.bool:
            for flag, now in zip(averaged, current, strict=True):
                flag.copy_(now)
        elif average is None and not averaged[0].is_floating_point():  # as torch does where it has no function for many
            for mean, now in zip(averaged, current, strict=True):
                mean.copy_(of_one(mean, now, count))
        else:
            of_many(averaged, current, count)

    return of


def copy_masks_into_averages() -> None:
    """Let torch's `AveragedModel`, which has no hook for it, copy masks; nothing changes for other networks."""
    AveragedModel.update_parameters = _updated
