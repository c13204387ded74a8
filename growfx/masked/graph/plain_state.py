"""State dicts of a masked model: zero outside the masks, and the plain model's for the model's own methods."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from growfx.distributed.sharded import is_sharded
from growfx.masked.layers import MaskedLayer

__all__ = ["hide_masks", "load_by_model", "state_by_model", "zeroed_outside_masks"]


def hide_masks(shell: nn.Module, names: Sequence[str] = ()) -> None:
    """Leave the named buffers out of the shell's own state dict; none: no longer.

    A method of the model that writes a checkpoint (`save_pretrained`) then writes the plain model's, zeros in place.
    """
    hooks = shell._state_dict_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "func", None) is _without_masks]:
        del hooks[key]
    if names:
        shell._register_state_dict_hook(functools.partial(_without_masks, tuple(names)))


def _without_masks(names: Sequence[str], module: nn.Module, state: Any, prefix: str, _: Any) -> None:
    if "_shell" in module.__dict__:  # the net's own state dict has them
        return
    for name in names:
        state.pop(f"{prefix}{name}", None)


def state_by_model(shell: nn.Module, names: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a `state_dict` that the model's class defines itself returns, with the masks; None where it defines none.

    Args:
        shell: the model.
        names: of the masks.
        args: of `state_dict`.
        kwargs: of `state_dict`.
    """
    if type(shell).state_dict is nn.Module.state_dict:
        return None
    found = shell.state_dict(*args, **kwargs)
    prefix = kwargs.get("prefix", "")
    for name in names:
        mask = shell.get_buffer(name)
        found[f"{prefix}{name}"] = mask if kwargs.get("keep_vars", False) else mask.detach()
    return found


def load_by_model(shell: nn.Module, names: Iterable[str]) -> Callable[..., Any] | None:
    """What loads a state dict with masks by the model's own `load_state_dict`; None where it defines none."""
    if type(shell).load_state_dict is nn.Module.load_state_dict:
        return None

    def load(state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        options = {name: value for name, value, usual in (("strict", strict, True), ("assign", assign, False))
                   if value is not usual}  # fmt: skip
        rest = {name: value for name, value in state.items() if name not in names}
        with _not_persistent(shell, names):
            result = shell.load_state_dict(rest, **options)
        with torch.no_grad():
            for name in names:
                shell.get_buffer(name).copy_(state[name])
        return result

    return load


@contextmanager
def _not_persistent(shell: nn.Module, names: Iterable[str]) -> Generator[None]:
    """Let nobody miss the named buffers in a state dict."""
    places = [name.rpartition(".") for name in names]
    registries = [(shell.get_submodule(owner)._non_persistent_buffers_set, leaf) for owner, _, leaf in places]
    added = [(registry, leaf) for registry, leaf in registries if leaf not in registry]
    for registry, leaf in added:
        registry.add(leaf)
    try:
        yield
    finally:
        for registry, leaf in added:
            registry.discard(leaf)


def zeroed_outside_masks(layers: Iterable[MaskedLayer], *, in_copies: bool) -> dict[int, Tensor]:
    """Make the weights of layers zero outside their masks, or copies of those that are not: by the parameter's id."""
    dirty = [
        layer
        for layer in layers
        if layer.present is None
        and not is_sharded(layer.parameter)
        and not layer.parameter.is_meta
        and not layer.obeys()
    ]
    if in_copies:
        return {id(x.parameter): torch.where(x.mask, x.parameter.detach(), 0) for x in dirty}
    for layer in dirty:
        layer.settle()
    return {}
