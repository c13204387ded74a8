"""A module that runs recorded graphs in place of a model's own forward: what the sparse runtime is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from growfx.masked.modules import chain_tensors
from growfx.recorded.inputs import Inputs
from growfx.recorded.recording import RecordedGraph, RecordFunction
from growfx.recorded.trace_report import TraceReport
from growfx.runtime.native.run import FAILED, UNSERVED, NetworkRun, is_watched

__all__ = ["Program"]

# Inputs that never have the same shape twice run the model's own forward from then on.
_MOST_RECORDINGS = 32


class Program(nn.Module):
    """A model in eval mode that runs as the graph recorded for inputs like those it gets.

    Where there is no graph that computes what the model computes, its own forward runs. Inputs that a `NetworkRun`
    computes are left to it, as long as nobody writes into a parameter or buffer of the model.

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
        self._modules["shell"] = shell
        self._recorder = recorder
        self.recordings: dict[tuple[bool, Any], RecordedGraph] = {}
        self.trace_report = TraceReport()
        self.training = shell.training
        self.planned: NetworkRun | None = None
        self._watched: list[Tensor] = []
        self._writes = 0

    def run_by(self, planned: NetworkRun | None) -> None:
        """Leave inputs to a run, which computes what the model computes with its present parameters and buffers."""
        self.planned = planned
        self._watched = [] if planned is None else [t for t in chain_tensors(self.shell) if not t.is_inference()]
        self._writes = self._count_writes()

    def _is_as_planned(self) -> bool:
        return not self.training and self._count_writes() == self._writes

    def _count_writes(self) -> int:
        return sum([tensor._version for tensor in self._watched])

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

    def recordings_in_mode(self, training: bool) -> Iterator[RecordedGraph]:
        """What was recorded in train or evaluation mode so far."""
        return (recording for (mode, _), recording in self.recordings.items() if mode == training)

    def note_direct_read(self, name: str) -> None:
        """Nothing to do: there are no masks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes."""
        if self.planned is not None and not torch.compiler.is_compiling() and self._is_as_planned():
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
        state = {key: value for key, value in self.__dict__.items() if key not in ("recordings", "_recorder")}
        clone.__dict__.update(copy.deepcopy(state, memo), recordings=dict(self.recordings), _recorder=self._recorder)
        clone.run_by(self.planned if self._is_as_planned() else None)
        return clone
