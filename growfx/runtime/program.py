"""A module that runs recorded graphs in place of a model's own forward: what the sparse runtime is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from growfx.recorded.inputs import Inputs
from growfx.recorded.recording import RecordedGraph, RecordFunction
from growfx.recorded.trace_report import TraceReport
from growfx.runtime.model_watch import ModelWatch
from growfx.runtime.native.run import FAILED, UNSERVED, NetworkRun, is_watched

__all__ = ["Program", "set_through"]

# Inputs that never have the same shape twice run the model's own forward from then on.
_MOST_RECORDINGS = 32


class Program(nn.Module):
    """A model in eval mode that runs as the graph recorded for inputs like those it gets.

    Where there is no graph that computes what the model computes, its own forward runs. Inputs that a `NetworkRun`
    computes are left to it, as long as nobody writes into a parameter or buffer of the model. While the model has other
    modules or hooks than when it was settled, its own forward runs.

    Args:
        shell: the model, whose forward is recorded and whose modules the graphs call.
        recorder: records `shell` for inputs, checked against it.

    Attributes:
        recordings: (mode, signature of the inputs) -> what was recorded.
        trace_report: what recording met.
        planned: the run for inputs of its signature; None where there is none.
    """

    def __init__(self, shell: nn.Module, recorder: RecordFunction) -> None:
        super().__init__()
        self._recorder = recorder
        self.recordings: dict[tuple[bool, Any], RecordedGraph] = {}
        self.trace_report = TraceReport()
        self.training = shell.training
        self.planned: NetworkRun | None = None
        self._watch: ModelWatch | None = None
        self._modules["shell"] = shell

    def settle(self, planned: NetworkRun | None = None) -> None:
        """Take the model as finished.

        Args:
            planned: a run to leave inputs to, which computes what the model does with its present parameters and
                buffers.
        """
        self.planned, self._watch = planned, ModelWatch(self.shell)

    def _is_intact(self) -> bool:
        return self._watch is None or self._watch.is_intact()

    def _is_as_planned(self) -> bool:
        return not self.training and self._watch is not None and self._watch.has_values()

    @property
    def shell(self) -> nn.Module:
        """The model."""
        shell = self._modules["shell"]
        assert shell is not None
        return shell

    @property
    def masked_parameters(self) -> dict[str, Any]:
        """None: there are no masks."""
        return {}

    def __getattr__(self, name: str) -> Any:
        # What the program has not is the model's.
        modules = self.__dict__.get("_modules", {})
        if name == "shell" or "shell" not in modules:
            raise AttributeError(name)
        return getattr(modules["shell"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        set_through(self, "shell", name, value)

    def recordings_in_mode(self, training: bool) -> Iterator[RecordedGraph]:
        """What was recorded in train or evaluation mode so far."""
        return (recording for (mode, _), recording in self.recordings.items() if mode == training)

    def note_direct_read(self, name: str) -> None:
        """Nothing to do: there are no masks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes."""
        compiling = torch.compiler.is_compiling()
        if not compiling and not self._is_intact():
            return self.shell(*args, **kwargs)
        if self.planned is not None and not compiling and self._is_as_planned():
            made = self.planned(args, kwargs)
            if made is FAILED:  # the model's own forward may not, or says what is wrong
                return self.shell(*args, **kwargs)
            if made is not UNSERVED:
                return made
        inputs = Inputs(args, kwargs)
        signature = None if self.training or inputs.structural else inputs.signature
        if signature is None:
            return self.shell(*args, **kwargs)
        recording = self.recordings.get((False, signature))
        if recording is None and is_watched():  # a recording would be seen, too
            return self.shell(*args, **kwargs)
        if recording is None and len(self.recordings) < _MOST_RECORDINGS:
            recording = self.recordings[False, signature] = self._recorder(self, inputs, training=False)
        if recording is None or not recording.faithful or not recording.batch_is_free:
            return self.shell(*args, **kwargs)
        return recording.run(self.shell, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        own = ("recordings", "_recorder", "_watch")
        state = {key: value for key, value in self.__dict__.items() if key not in own}
        intact = self._is_intact()
        recordings = dict(self.recordings) if intact else {}
        clone.__dict__.update(copy.deepcopy(state, memo), recordings=recordings, _recorder=self._recorder, _watch=None)
        if self._watch is not None:
            clone.settle(self.planned if intact and self._is_as_planned() else None)
        return clone


def set_through(outer: nn.Module, inner: str, name: str, value: Any) -> None:
    """Set an attribute of a module that shows those of another as its own, where it is: `net.fc = nn.Identity()`.

    Args:
        outer: the module; its own attributes are set as always.
        inner: the name of the other one among its modules.
        name, value: the attribute.
    """
    shown = outer.__dict__.get("_modules", {}).get(inner)
    is_own = name in outer.__dict__ or name == inner or name[0] == "_" or hasattr(type(outer), name)
    if shown is None or is_own or not hasattr(shown, name):
        nn.Module.__setattr__(outer, name, value)
    else:
        setattr(shown, name, value)
