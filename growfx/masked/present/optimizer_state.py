"""Optimizers of values of present edges: which there can be, and what they know of an edge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from growfx.errors import CheckpointError, ConfigError

__all__ = ["POINTWISE", "check_pointwise", "check_state", "exchange_parameter"]

# Optimizers of torch and timm whose step of a weight does not depend on its shape: edge by edge, or by the norm of the
# whole, which absent edges add nothing to.
_TORCH = (
    *("adadelta.Adadelta", "adagrad.Adagrad", "adam.Adam", "adamax.Adamax", "adamw.AdamW", "asgd.ASGD"),
    *("nadam.NAdam", "radam.RAdam", "rmsprop.RMSprop", "rprop.Rprop", "sgd.SGD"),
)
_TIMM = (
    *("adabelief.AdaBelief", "adamw.AdamWLegacy", "adan.Adan", "lamb.Lamb", "lars.Lars", "lion.Lion"),
    *("nadam.NAdamLegacy", "nadamw.NAdamW", "radam.RAdamLegacy", "rmsprop_tf.RMSpropTF"),
)
POINTWISE = frozenset({*(f"torch.optim.{name}" for name in _TORCH), *(f"timm.optim.{name}" for name in _TIMM)})


def check_pointwise(optimizer: Optimizer) -> None:
    """Raise `ConfigError` for an optimizer whose step of a weight is known to depend on the weight's shape.

    Those of other libraries are taken at their word until they have state (`check_state`).
    """
    kind = type(optimizer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name not in POINTWISE and name.startswith(("torch.optim.", "timm.optim.")):
        allowed = ", ".join(sorted(f"`{known.rpartition('.')[2]}`" for known in POINTWISE))
        raise ConfigError(
            f'`storage` = "present" expects an optimizer that steps each edge by itself, got `{kind.__name__}`, whose '
            f"state cannot be re-indexed or whose step depends on the shape of a weight; allowed are {allowed}, or "
            '`storage` = "dense"'
        )


def check_state(optimizer: Optimizer, state: Mapping[str, Any], edges: int, name: str) -> None:
    """Check that `state` has a value for each of the `edges` of the layer `name`, or one for the whole layer.

    Raises:
        CheckpointError: it is of a whole weight, or of another number of edges: loaded from a run with other masks or
            another storage.
        ConfigError: it is of another kind, and cannot follow the edges when masks change.
    """
    for key, value in state.items():
        tensors = value if isinstance(value, (list, tuple)) else [value]
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.numel() == 1 or tuple(tensor.shape) == (edges,):
                continue
            if tensor is value and key in _OF_EDGES:
                raise CheckpointError(
                    f"the optimizer's state of `{name}` (`{key}`) has shape {tuple(tensor.shape)}, expected "
                    f"({edges},), a value for each present edge; load a state that was saved with `storage` = "
                    "`present` and these masks, after the network's own"
                )
            raise ConfigError(
                f"`{type(optimizer).__name__}` has state of `{name}` (`{key}`) of shape {tuple(tensor.shape)}, which "
                f"cannot be re-indexed: expected a value for each of the {edges} present edges; use another "
                'optimizer, or `storage` = "dense"'
            )


_OF_EDGES = {
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "grad_avg"),
    *("sum", "ax", "prev", "step_size", "exp_avg_var", "exp_avg_diff"),
}


def exchange_parameter(
    optimizer: Optimizer, before: nn.Parameter, after: nn.Parameter, convert: Callable[[Tensor], Tensor]
) -> None:
    """Let an optimizer hold `after` in the place of `before`; `convert` turns state of its shape into the other's.

    Nothing happens to an optimizer that holds neither.
    """
    for group in optimizer.param_groups:
        group["params"][:] = [after if parameter is before else parameter for parameter in group["params"]]
    if before in optimizer.state:
        state = optimizer.state.pop(before)
        optimizer.state[after] = {
            key: convert(value) if isinstance(value, Tensor) and value.shape == before.shape else value
            for key, value in state.items()
        }
