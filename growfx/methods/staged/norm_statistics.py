"""Norm statistics of a network whose weights were not trained into being, such as an average of several networks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from growfx.errors import DataError

__all__ = ["reestimate_norms"]


def reestimate_norms(net: nn.Module, batches: Iterable[tuple[Tensor, Any]]) -> None:
    """Replace the running mean and variance of every batch norm by their averages over `batches`.

    What `torch.optim.swa_utils.update_bn` does (Izmailov et al., Averaging Weights Leads to Wider Optima, UAI 2018),
    with dropout and the like as in training; every batch weighs the same, for any momentum of a norm. No gradients are
    computed and no parameter changes; the mode of every module is as it was. Nothing is read where no norm keeps
    statistics. Statistics of other layers (instance norms that track them) stay.

    Args:
        net: on the device of the batches.
        batches: (inputs (B, ...), anything); inputs as `net` takes them.

    Raises:
        DataError: there are norms to estimate, but no batches; they are then as they were.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not any(norm.track_running_stats for norm in norms):
        return
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise DataError("the training loader gives no batches to estimate norm statistics from")
    modes = [(module, module.training) for module in net.modules()]
    momenta = [norm.momentum for norm in norms]
    try:
        update_bn((inputs for inputs, _ in itertools.chain([first], stream)), net)
    finally:
        # torch leaves one mode for all modules, and after an error norms without momentum
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
