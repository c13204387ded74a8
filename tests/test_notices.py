"""Warnings: once for each cause, pointing at the caller, and kept on the object."""

import warnings

import pytest

import growfx
from growfx.notices import hearing, warn_once


def test_a_message_warns_once_for_an_object_and_stays_on_it():
    notes: list[str] = []
    with pytest.warns(growfx.GrowfxWarning, match="masks were drawn anew"):
        warn_once("masks were drawn anew", notes)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_once("masks were drawn anew", notes)
    assert not seen
    assert notes == ["masks were drawn anew"]


def test_warnings_can_be_heard_beside_being_shown():
    heard: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with hearing(heard):
            warnings.warn("of numpy", RuntimeWarning, stacklevel=1)
            warn_once("pay attention", [])
            warn_once("pay attention", [])
    assert heard == ["pay attention"]
    assert len(seen) == 3


def test_a_warning_points_at_the_caller():
    with pytest.warns(growfx.GrowfxWarning) as seen:
        warn_once("pay attention", [])
    assert seen[0].filename == __file__
