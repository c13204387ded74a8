"""Stand for a model: have its parameters, modules, mode, attributes and methods for one's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn

from growfx.errors import ConfigError, TraceError

__all__ = ["UNWRAP_FIRST", "ModelFace"]

_REGISTRIES = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip

UNWRAP_FIRST = (
    "a MaskedGraph cannot be traced or scripted: its masks would become constants; work on the plain model, "
    "growfx.unwrap(net), which has zeros in their place"
)


class ModelFace(fx.GraphModule):
    """A module that is the model in all but its class.

    It shares the very registries of the model's root, so that whatever changes one changes the other. What it has not
    itself is looked up on the model, and set there once `_complete` is.
    """

    def _stand_for(self, shell: nn.Module) -> None:
        """Be the root of `shell`."""
        self.__dict__["_shell"] = (shell,)  # in a tuple, or it would be registered as a submodule
        for registry in _REGISTRIES:
            self.__dict__[registry] = shell.__dict__[registry]

    def _own_state(self) -> dict[str, Any]:
        """Attributes that are not the model's."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_shell", *_REGISTRIES)}

    def _reading_any_weight(self) -> AbstractContextManager[Any]:
        """A block in which code of the model that is not its forward may read any weight without calling the layer."""
        raise NotImplementedError

    def _check_parts(self) -> None:
        """Check that the model still has the parts that it had, before a method of it runs."""
        raise NotImplementedError

    @property
    def shell(self) -> nn.Module:
        """The model's own class over the same masked modules and parameters."""
        return self._shell[0]

    @property
    def training(self) -> bool:
        """Whether the model is in train mode: one flag for both, whoever sets it."""
        shell = self.__dict__.get("_shell")
        return shell is None or shell[0].training

    @training.setter
    def training(self, mode: bool) -> None:
        shell = self.__dict__.get("_shell")
        if shell is not None:
            shell[0].training = mode

    def get_submodule(self, target: str) -> nn.Module:
        """The submodule of that name, also where the model calls one `layers` or `graph`."""
        return self.shell.get_submodule(target) if target else self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.shell._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.shell._load_from_state_dict(*args, **kwargs)

    def __prepare_scriptable__(self) -> Any:
        raise TraceError(UNWRAP_FIRST)

    # -- attributes and methods of the model --------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        # Called where the net itself has nothing of that name: `no_weight_decay()`, `pretrained_cfg`, ... of the model.
        shell = self.__dict__.get("_shell")
        if shell is None:
            raise AttributeError(name)
        if isinstance(getattr(type(shell[0]), name, None), property) and self.__dict__.get("_complete"):
            with self._reading_any_weight():
                return getattr(shell[0], name)
        value = getattr(shell[0], name)
        if inspect.ismethod(value) and value.__self__ is shell[0]:
            return self._with_masked_reads(value)
        return value

    def _with_masked_reads(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return method(*args, **kwargs)
            self._check_parts()
            # A method may read what the forward calls.
            with self._reading_any_weight():
                return method(*args, **kwargs)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        shown = getattr(type(self), name, None)
        registered = isinstance(value, (nn.Module, nn.Parameter)) or any(
            name in self.__dict__.get(registry, ()) for registry in ("_parameters", "_buffers", "_modules")
        )
        if isinstance(shown, property) and shown.fset is None and not registered:
            raise ConfigError(
                f"`{name}` of a net is read-only; change masks by `net.set_masks({{name: mask}})`, and set "
                f"an attribute `{name}` of the model by `net.shell.{name}`"
            )
        if not self.__dict__.get("_complete") or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self.shell, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or not self.__dict__.get("_complete"):
            super().__delattr__(name)
        else:
            delattr(self.shell, name)

    def __getitem__(self, index: Any) -> Any:
        """A part of a model that has numbered parts (`nn.Sequential`)."""
        shell: Any = self.shell
        return shell[index]

    def __len__(self) -> int:
        shell: Any = self.shell
        return len(shell)

    def __iter__(self) -> Any:
        shell: Any = self.shell
        return iter(shell)

    def __contains__(self, item: object) -> bool:
        shell: Any = self.shell
        return item in shell

    def __bool__(self) -> bool:
        return bool(self.shell)
