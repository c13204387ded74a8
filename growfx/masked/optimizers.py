"""Hooks that every optimizer calls around its step, so that nobody has to tell growfx about theirs.

Around a step of any `torch.optim.Optimizer` its masked weights and their state are kept at +0.0 outside the masks, and
the step is counted, which tells a step from one that a loss scaler left out. State is what has the weight's shape,
whatever its name. State of other shapes (factored moments, preconditioners) belongs to rows and columns, not to
edges, and is left alone; only the weights are masked after the step.

Layers that keep values of present edges only have nothing to mask: their state moves with the edges instead.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from growfx.distributed.sharded import all_finite, is_sharded, local_shard, part_of
from growfx.errors import ConfigError
from growfx.masked.layers import MaskedLayer
from growfx.masked.mask_bits import pack
from growfx.masked.present.optimizer_state import check_pointwise, check_state
from growfx.masked.present.values import Move, on_move
from growfx.masked.registry import LAYER_OF, is_replaced
from growfx.notices import warn_once

__all__ = [
    "GROUP_STEP",
    "StepWatch",
    "clear_state",
    "forget_state",
    "hold",
    "optimizers_of",
    "optimizers_together",
    "step_ahead_by",
    "watch_optimizers",
]

# Optimizers that work edge by edge and add nothing else: where weight, gradient and state are zero, they stay
# zero, and a pass over the weights after each step is saved. All others (orthogonalised or preconditioned updates,
# moments with an epsilon in them, anything unknown) are cleaned up after. The tests hold each of these to it.
_TORCH = ("sgd.SGD", "adam.Adam", "adamw.AdamW", "rmsprop.RMSprop", "nadam.NAdam", "radam.RAdam", "adagrad.Adagrad")
_TIMM = ("lamb.Lamb", "lion.Lion", "lars.Lars", "adamp.AdamP", "adan.Adan", "adamw.AdamWLegacy", "nadamw.NAdamW")
_KEEPS_ZEROS = {f"torch.optim.{name}" for name in _TORCH} | {f"timm.optim.{name}" for name in _TIMM}

_CAUTION = (
    "the optimizer's `caution` divides the step of a layer by the share of its weights that move, and absent edges "
    'never move: at a density of 10 % present edges take up to ten times the step; `storage` = "present" (of '
    "`growfx.train` and `growfx.use_kernels`) leaves absent edges out"
)

# Where optimizers such as timm's Lamb and Adan count steps by group, for the correction of moments that start at zero.
GROUP_STEP = "step"


@dataclass
class _Record:
    """What is known of an optimizer that steps masked weights.

    `steps`: made so far. `cleared`: by parameter, the mask (identity, version) its state was last cleared for. `state`:
    by parameter, identities and versions of its state after the last step, which tell what was loaded or edited since.
    `versions`: of the parameters, before each step under way (a subclass's step may call its base class's). `hidden`:
    before each, the gradients of parameters that are stepped already, which the optimizer must not see. `masks`: by
    parameter, the mask itself, packed, for LBFGS: what is lost for a mask written anew as it was cannot be had again.
    `notes`: what was warned of.
    """

    steps: int = 0
    cleared: dict[int, tuple[int, int]] = field(default_factory=dict)
    state: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    versions: list[dict[int, int]] = field(default_factory=list)
    hidden: list[list[tuple[nn.Parameter, Tensor | None]]] = field(default_factory=list)
    masks: dict[int, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


_RECORDS: weakref.WeakKeyDictionary[Optimizer, _Record] = weakref.WeakKeyDictionary()


def optimizers_of(parameter: nn.Parameter) -> list[Optimizer]:
    """Return the optimizers that have stepped a masked parameter, those inside wrappers among them."""
    return [optimizer for optimizer, record in _RECORDS.items() if id(parameter) in record.cleared]


def optimizers_together(optimizer: Optimizer, layers: Iterable[MaskedLayer]) -> list[Optimizer]:
    """Return `optimizer`, and the others that have stepped a weight of `layers`."""
    others = {id(each): each for layer in layers for each in optimizers_of(layer.trained)}
    return [optimizer, *(each for each in others.values() if each is not optimizer)]


def forget_state(optimizer: Optimizer, layers: Iterable[MaskedLayer]) -> None:
    """Forget the state of every parameter of `optimizer`, and of the others that have stepped a weight of `layers`."""
    for each in optimizers_together(optimizer, layers):
        each.state.clear()
        for group in each.param_groups:
            if GROUP_STEP in each.defaults:
                group[GROUP_STEP] = each.defaults[GROUP_STEP]
            else:
                group.pop(GROUP_STEP, None)


def hold(optimizer: Optimizer, layer: MaskedLayer) -> None:
    """Take note that an optimizer holds the parameter of `layer`, also before its first step."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if id(layer.trained) in known:
        _RECORDS.setdefault(optimizer, _Record()).cleared.setdefault(id(layer.trained), layer.mask_marker())


def _move_state(values: nn.Parameter, move: Move, name: str) -> None:
    """Move what optimizers know of the values of the layer `name` with their edges.

    Raises:
        ConfigError: state that is not one value an edge; nothing is changed then.
    """
    moved: list[tuple[dict[str, Any], str, Tensor]] = []
    for optimizer in optimizers_of(values):
        state = optimizer.state.get(values, {})
        check_state(optimizer, state, move.before, name)
        moved += [
            (state, key, move(value))
            for key, value in state.items()
            if isinstance(value, Tensor) and value.shape == (move.before,)
        ]
    for state, key, value in moved:
        state[key] = value


def clear_state(optimizer: Optimizer, parameter: nn.Parameter, where: Tensor) -> None:
    """Set the optimizer's state of `parameter` to zero at the positions `where` (bool, the parameter's shape).

    The memory of `LBFGS` is of the whole network at once: it starts anew.
    """
    if isinstance(optimizer, LBFGS):
        optimizer.state.clear()
        return
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue
        if value.is_floating_point():
            _set_zero(local_shard(value), part_of(where, value))
        elif (levels := _levels_of(state, key)) is not None:
            local_shard(value).masked_fill_(part_of(where, value), int(levels.abs().argmin()))


def _levels_of(state: dict[Any, Any], key: Any) -> Tensor | None:
    """What the codes in a state stand for, at their places: bitsandbytes has them beside it, `qmap1` for `state1`."""
    levels = state.get(key.replace("state", "qmap")) if isinstance(key, str) and key.startswith("state") else None
    return levels if isinstance(levels, Tensor) and levels.is_floating_point() else None


def _set_zero(value: Tensor, where: Tensor) -> None:
    """Set `value` to zero at the positions `where`.

    State in few bits (torchao's 8-bit, 4-bit and fp8 optimizers) is a subclass that may have no operator but `copy_`,
    in both directions, which rounds to its levels: it becomes the nearest of them to zero. One without even that keeps
    what it has: weights are masked after each step whatever the state is.
    """
    try:
        value.masked_fill_(where, 0.0)
    except NotImplementedError:
        with torch.no_grad(), suppress(NotImplementedError):
            plain = torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)
            if bool(plain[where].any()):  # to round once more what is zero already could move the others
                value.copy_(plain.masked_fill_(where, 0.0))


class StepWatch:
    """Tells whether an optimizer stepped since it was last asked, or a loss scaler left the step out.

    A torch optimizer announces its steps, and so does one inside a wrapper. Before the first announcement, and for an
    optimizer that is none of torch's, a step is taken for left out when gradients are not finite: the one reason a
    scaler has.
    """

    def __init__(self, optimizer: object, parameters: Iterable[nn.Parameter]) -> None:
        self._optimizer, self._parameters = optimizer, list(parameters)
        self._ids = {id(parameter) for parameter in self._parameters}
        self._seen, self._announced = self._count(), False

    def stepped(self) -> bool:
        """Whether there was a step since the last call, or since this watch was made."""
        before, self._seen = self._seen, self._count()
        if self._seen > before:
            self._announced = True
            return True
        if self._announced:
            return False
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        return all_finite(gradients)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepWatch:
        """Watch the copies: the steps of the originals are not theirs."""
        return StepWatch(copy.deepcopy(self._optimizer, memo), copy.deepcopy(self._parameters, memo))

    def _count(self) -> int:
        return sum(
            record.steps
            for optimizer, record in _RECORDS.items()
            if optimizer is self._optimizer or not self._ids.isdisjoint(record.cleared)
        )


def _masked_layers_of(optimizer: Optimizer) -> Iterator[MaskedLayer]:
    sharded: dict[int, MaskedLayer] | None = None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            layer = cast("MaskedLayer | None", LAYER_OF.get(id(parameter)))
            if layer is None and is_sharded(parameter):
                # `fully_shard` gave the layer another parameter, which no forward sees: that one uses what is gathered
                known_layers = cast("list[MaskedLayer]", list(LAYER_OF.values()))
                sharded = sharded or {id(known.parameter): known for known in known_layers}
                layer = sharded.get(id(parameter))
            if layer is not None and layer.trained is parameter:
                yield layer


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not LAYER_OF:
        return None
    if any(is_replaced(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        raise ConfigError(
            f"the optimizer (`{type(optimizer).__name__}`) expects weights that the network has no more: its `storage` "
            "was changed since, or it was copied along with a network that keeps present edges only, whose copy has "
            "whole weights; make the optimizer from `net.parameters()` after that"
        )
    layers = list(_masked_layers_of(optimizer))
    if not layers:
        return None
    record = _RECORDS.setdefault(optimizer, _Record())
    versions: dict[int, int] = {}
    masked = _with_closure_masked(layers, args, kwargs)
    scale = vars(optimizer).get("grad_scale")  # where a fused step is to unscale by itself
    for layer in layers:
        if layer.present is not None:
            _check_present(optimizer, layer, record)
        else:
            _clear_if_touched(optimizer, layer, record)
        if masked is None:
            # With a closure the gradient is not whole yet: what is there is the accumulated part of it.
            layer.optimizer_will_step(scale)
        versions[id(layer.trained)] = layer.trained._version
    record.versions.append(versions)
    whole = masked is not None or scale is not None or _others_look(optimizer)
    record.hidden.append([] if whole else _step_ahead(optimizer, layers))
    return masked


def _check_present(optimizer: Optimizer, layer: MaskedLayer, record: _Record) -> None:
    """Refuse a step over values of present edges that is not one of single edges, or with state of whole weights."""
    key = id(layer.trained)
    if key not in record.cleared:
        check_pointwise(optimizer)
        record.cleared[key] = layer.mask_marker()
    present = layer.present
    assert present is not None
    present.follow(layer.mask, by_version=True)  # state moves first, where the mask is another one
    check_state(optimizer, optimizer.state.get(present.values, {}), present.values.numel(), present.name)


def _others_look(optimizer: Optimizer) -> bool:
    """Whether hooks run between these two, which would find no gradients or change them too late."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return True
    last, first = [*_global_optimizer_pre_hooks.values()][-1], next(iter(_global_optimizer_post_hooks.values()))
    return last is not _before_step or first is not _after_step


def _step_ahead(optimizer: Optimizer, layers: list[MaskedLayer]) -> list[tuple[nn.Parameter, Tensor | None]]:
    """Let those who can step parameters over present edges alone do so, and hide these from the optimizer."""
    hidden: list[tuple[nn.Parameter, Tensor | None]] = []
    with torch.no_grad():
        for step in _STEPPING_AHEAD:
            hidden += [(parameter, parameter.grad) for parameter in step(optimizer, layers)]
    for parameter, _ in hidden:
        parameter.grad = None
    return hidden


def _clear_if_touched(optimizer: Optimizer, layer: MaskedLayer, record: _Record) -> None:
    """Clear the state of absent edges where the mask is another than at the last step, or others changed the state."""
    parameter, marker = layer.parameter, layer.mask_marker()
    key = id(parameter)
    same_mask = record.cleared.get(key) == marker
    if not same_mask:
        _warn_of_caution(optimizer, layer, record)
    # The memory of LBFGS, of all edges at once, may be kept where it was loaded; its steps are cleaned up after.
    if isinstance(optimizer, LBFGS):
        if not same_mask:
            bits, before = pack(layer.mask), record.masks.get(key)
            if before is not None and not torch.equal(bits, before):
                clear_state(optimizer, parameter, ~layer.mask)
            record.masks[key] = bits
    elif not same_mask or record.state.get(key) != _versions(optimizer, parameter):
        clear_state(optimizer, parameter, ~layer.mask)
    record.cleared[key] = marker


def _warn_of_caution(optimizer: Optimizer, layer: MaskedLayer, record: _Record) -> None:
    """Warn of timm's cautious optimizers, which divide a step by the share of a whole weight that takes part in it."""
    if not any(group.get("caution") for group in optimizer.param_groups) or layer.mask.all():
        return
    wrappers = [_RECORDS[each].notes for each in optimizers_of(layer.parameter) if each is not optimizer]
    if not any(wrappers):
        warn_once(_CAUTION, record.notes)


def _versions(optimizer: Optimizer, parameter: nn.Parameter) -> list[tuple[int, int]]:
    """What is another list after the state of a parameter was loaded, or edited in a way that torch takes note of."""
    state = optimizer.state.get(parameter, {})
    return [(id(value), value._version) for value in state.values() if isinstance(value, Tensor)]


def _with_closure_masked(layers: list[MaskedLayer], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let gradients that are made within the step, by a closure, reach the optimizer as others do."""

    def masked(closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            for layer in layers:
                layer.dense_gradient = None  # the last call counts, as for the optimizer
            loss = closure()
            for layer in layers:
                layer.optimizer_will_step(None)
            return loss

        return run

    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": masked(kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):
        return (args[0], masked(args[1]), *args[2:]), kwargs
    return None


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    record = _RECORDS.get(optimizer)
    if record is None or not record.versions:
        return
    record.versions.pop()
    for parameter, gradient in record.hidden.pop():
        parameter.grad = gradient
    found_inf = vars(optimizer).get("found_inf")  # of a fused step, which leaves itself out
    left_out = found_inf is not None and bool(found_inf)
    # A fused step that is left out at the very start leaves state behind that nobody has written.
    keeps_zeros = not left_out and f"{type(optimizer).__module__}.{type(optimizer).__qualname__}" in _KEEPS_ZEROS
    for layer in _masked_layers_of(optimizer):
        if layer.present is not None:
            continue
        if not keeps_zeros:
            layer.settle()
            if not isinstance(optimizer, LBFGS):
                clear_state(optimizer, layer.parameter, ~layer.mask)
        record.state[id(layer.parameter)] = _versions(optimizer, layer.parameter)
    record.steps += not left_out


# Called before each step with the optimizer and its masked layers; step parameters themselves and return these.
_STEPPING_AHEAD: list[Callable[[Optimizer, list[MaskedLayer]], list[nn.Parameter]]] = []


def step_ahead_by(step: Callable[[Optimizer, list[MaskedLayer]], list[nn.Parameter]]) -> None:
    """Ask `step` before each step of an optimizer to make the part of it that it can; see `present_step.py`."""
    if step not in _STEPPING_AHEAD:
        _STEPPING_AHEAD.append(step)


_WATCHING: list[Any] = []  # the handles of the hooks, once they are there


def watch_optimizers() -> None:
    """Have every optimizer's steps announced from now on; installed once, with the first masked network."""
    if not _WATCHING:
        _WATCHING.append(register_optimizer_step_pre_hook(_before_step))
        _WATCHING.append(register_optimizer_step_post_hook(_after_step))
        on_move(_move_state)
