"""The recordings of a network, by mode, inputs and settings: made when a pass first asks for one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from growfx.distributed.sharded import check_recordable, fsdp_modules
from growfx.errors import TraceError
from growfx.masked.graph.layer_table import LayerTable
from growfx.masked.modules import settings_of
from growfx.masked.parameter import MaskedParameter
from growfx.recorded.inputs import Inputs
from growfx.recorded.recording import RecordedGraph, RecordFunction, without_compiler
from growfx.recorded.trace_report import TraceReport

__all__ = ["Recordings"]

# Recordings kept for passes; the oldest goes first.
_MOST_RECORDINGS = 32

_Key = tuple[bool, Any]


class Recordings:
    """Recordings of one network, kept by mode, inputs and the settings that its modules hold.

    Args:
        table: the model that is recorded, with its masked layers; where it reads a weight directly is noted there.
        report: what is filled in with what was met.
        record: makes a recording.

    Attributes:
        record: as given; may be exchanged.
        trace_report: the report.
    """

    def __init__(self, table: LayerTable, report: TraceReport, record: RecordFunction) -> None:
        self.record, self.trace_report = record, report
        self._table = table
        self._kept: dict[_Key, RecordedGraph] = {}
        # Recordings that hold for the values they were made with, to work on where the model takes values out of data.
        self._by_values: dict[_Key, RecordedGraph] = {}
        self._known_settings = 0

    # -- what is recorded ---------------------------------------------------------------------------------------------

    @property
    def shell(self) -> nn.Module:
        """The model."""
        return self._table.shell

    @property
    def masked_parameters(self) -> dict[str, MaskedParameter]:
        """Its masks on parameters of modules that stay what they are."""
        return self._table.parameters

    def note_direct_read(self, name: str) -> None:
        """Remember that the model reads the weight of the masked layer `name` without calling the layer."""
        self._table.note_direct_read(name)

    def recordings_in_mode(self, training: bool) -> Iterator[RecordedGraph]:
        """What was recorded in train or evaluation mode so far."""
        return (recording for (mode, _), recording in self._kept.items() if mode == training)

    # -- recordings ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def batch_is_free(self) -> bool:
        """Whether all hold for any batch size, those aside that hold for the values they were made with only."""
        return all(recording.batch_is_free or recording.holds_for_values for recording in self._kept.values())

    def known(self, inputs: Inputs, training: bool) -> RecordedGraph | None:
        """The recording for any batch of inputs like these; None where there is none yet. Checks no values."""
        return self._kept.get(self._key(inputs, training, batch_is_free=True))

    def find(self, inputs: Inputs, training: bool) -> RecordedGraph | None:
        """The recording that holds for inputs like these in the given mode; None where none does yet."""
        for free in (True, False):
            key = self._key(inputs, training, free)
            found = None if key[1] is None else self._kept.get(key)
            if found is not None and found.batch_is_free >= free and _holds(found, self.shell, inputs):
                return found
        return None

    def make(self, inputs: Inputs, training: bool) -> RecordedGraph:
        """Record, compare with the model, and keep. Raises `TraceError` where the model fails on the inputs."""
        check_recordable(self.shell)
        with without_compiler(), torch.inference_mode(False):  # constants may be used in training later
            made = self.record(self, inputs, training)
        key = self._key(inputs, training, made.batch_is_free)
        if key[1] is not None or not self._kept:
            while len(self._kept) >= _MOST_RECORDINGS:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = made
        return made

    # What `torch.compiler.disable` sets; calling that here would import the whole compiler with growfx.
    make._torchdynamo_disable = True  # type: ignore[attr-defined]

    def for_pass(self, recording: RecordedGraph, inputs: Inputs, training: bool, look_inside: bool) -> RecordedGraph:
        """The recording that a pass works on, where `recording` is the one to run.

        Where the model takes values out of its data, or leaves modules whole, it is one for these very values, made
        anew when first asked for.

        Raises:
            TraceError: the model cannot be recorded faithfully for these inputs.
        """
        report = self.trace_report
        # What is drawn by chance is drawn anew in a graph that leaves such modules whole.
        by_chance = all("random number" in why for why in report.opaque.values())
        looks = bool(report.opaque) and (look_inside or not (training or by_chance))
        # Passes that follow values have no use for checks of them.
        looks |= look_inside and recording.holds is not None
        if looks or not recording.faithful:
            values = recording.code.src if recording.holds is not None else ""  # which names those read from data
            keyed = inputs.keyed(batch_is_free=False)
            key = (training, (keyed, values, look_inside, inputs.digest))
            recording = self._for_values(key, keyed, inputs, training, holds_for_values=True, look_inside=look_inside)
        elif look_inside and recording.own_gradient and not training:
            keyed = inputs.keyed(batch_is_free=recording.batch_is_free)
            recording = self._for_values((False, ("inside", keyed)), keyed, inputs, False, look_inside=True)
        if not recording.faithful:
            raise TraceError(
                "the recording is not faithful, so there is no graph to work on: "
                f"{report.opaque.get('', '')} {' '.join(report.notes)}"
            )
        return recording

    def _for_values(self, key: _Key, keyed: Any, inputs: Inputs, training: bool, **how: bool) -> RecordedGraph:
        found = self._by_values.get(key)
        if found is None or keyed is None:  # inputs without a key are recorded every time
            with without_compiler(), torch.inference_mode(False):
                found = self._by_values[key] = self.record(self, inputs, training, **how)
        return found

    def _key(self, inputs: Inputs, training: bool, batch_is_free: bool) -> _Key:
        """What a recording depends on: the mode, the inputs, and the numbers, flags and names that modules hold."""
        signature = inputs.keyed(batch_is_free=batch_is_free)
        return training, None if signature is None else (signature, self._settings())

    def _settings(self) -> int:
        if fsdp_modules(self.shell):  # which gives modules other classes and hooks; nothing is recorded from then on
            return self._known_settings
        # What a forward assigns is its state, not a setting.
        states = [what.partition("`")[2].rstrip("`") for what in self.trace_report.side_effects]
        self._known_settings = settings_of(self.shell, states)
        return self._known_settings

    def copied(self, table: LayerTable, shown: fx.Graph) -> tuple[Recordings, fx.Graph]:
        """Those of a copy of the network, and its copy of the graph `shown`.

        It has its own graphs, since one who edits a copy's graph edits no other.
        """
        copied = Recordings(table, copy.deepcopy(self.trace_report), self.record)
        copied._known_settings = self._known_settings
        copied._kept = {key: replace(r, graph=copy.deepcopy(r.graph)) for key, r in self._kept.items()}
        key = next((key for key, r in self._kept.items() if r.graph is shown), None)
        return copied, fx.Graph() if key is None else copied._kept[key].graph


def _holds(recording: RecordedGraph, shell: nn.Module, inputs: Inputs) -> bool:
    return recording.holds is None or bool(recording.holds(shell, inputs))
