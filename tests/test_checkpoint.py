import errno
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growfx.checkpoint import Checkpoints, content_digest, read
from growfx.errors import CheckpointError


def state(number: int) -> dict:
    return {
        "net": {"weight": torch.full((50, 30), float(number)), "mask": torch.arange(6) % 2 == 0},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.99), "foreach": None},
        "epoch": number,
        "name": "x",
    }


def same(a, b) -> bool:
    return content_digest(a) == content_digest(b)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoint")


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_saved_is_loaded_bit_for_bit(checkpoints):
    checkpoints.save(state(1))
    loaded, notice = checkpoints.load()
    assert notice is None
    assert same(loaded, state(1))
    assert loaded["net"]["mask"].dtype == torch.bool
    assert loaded["optimizer"]["betas"] == (0.9, 0.99)
    assert list(loaded["optimizer"]["state"]) == [0]


def test_torch_loads_a_checkpoint_without_trusting_it(checkpoints):
    checkpoints.save(state(1))
    content = torch.load(checkpoints.latest, weights_only=True)
    assert same(content["state"], state(1))


def test_a_view_is_stored_without_the_storage_behind_it(checkpoints):
    checkpoints.save({"view": torch.zeros(1_000_000)[:3]})
    assert checkpoints.latest.stat().st_size < 10_000


def test_numbers_of_numpy_load_without_numpy(checkpoints):
    import numpy as np

    checkpoints.save({"a": np.float64(0.5)})
    assert type(checkpoints.load()[0]["a"]) is float


def test_other_objects_are_refused_by_their_place(checkpoints):
    with pytest.raises(TypeError, match=r"state\.a\.b: a checkpoint cannot hold a set"):
        checkpoints.save({"a": {"b": {1}}})
    assert not checkpoints.exists()


def test_the_one_before_is_kept_and_the_best_stays(checkpoints):
    checkpoints.save(state(1))
    checkpoints.save(state(2), best=True)
    checkpoints.save(state(3))
    checkpoints.save(state(4))
    assert read(checkpoints.latest)["epoch"] == 4
    assert read(checkpoints.previous)["epoch"] == 3
    assert read(checkpoints.best)["epoch"] == 2
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["best.pt", "latest.pt", "previous.pt"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(checkpoints, damage):
    for number in (1, 2):
        checkpoints.save(state(number))
    content = checkpoints.latest.read_bytes()
    if damage == "flip":
        flip_a_bit(checkpoints.latest)
    else:
        new = {"cut": content[: len(content) // 2], "empty": b"", "text": b"not a checkpoint"}[damage]
        checkpoints.latest.write_bytes(new)
    loaded, notice = checkpoints.load()
    assert loaded["epoch"] == 1
    assert notice is not None
    assert "latest.pt` is damaged" in notice
    assert "previous.pt" in notice
    # The next save must not push the damaged file over the good one.
    checkpoints.save(state(3))
    checkpoints.latest.unlink()
    assert checkpoints.load()[0]["epoch"] == 1


@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_harmless_or_noticed(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flip")
    checkpoints = Checkpoints(folder)
    checkpoints.save(state(1))
    content = bytearray(checkpoints.latest.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    checkpoints.latest.write_bytes(content)
    try:
        loaded = read(checkpoints.latest)
    except CheckpointError:
        return
    assert same(loaded, state(1))


def test_both_damaged_names_both(checkpoints):
    for number in (1, 2):
        checkpoints.save(state(number))
    flip_a_bit(checkpoints.latest)
    flip_a_bit(checkpoints.previous)
    with pytest.raises(CheckpointError, match=r"latest\.pt` is damaged.*previous\.pt` is damaged"):
        checkpoints.load()


def test_a_crash_between_the_renames_loses_nothing(checkpoints):
    for number in (1, 2):
        checkpoints.save(state(number))
    checkpoints.latest.rename(checkpoints.previous)
    assert checkpoints.exists()
    assert checkpoints.load()[0]["epoch"] == 2


def test_a_full_disk_leaves_the_old_checkpoint_as_it_was(checkpoints, monkeypatch):
    checkpoints.save(state(1))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left on device"):
        checkpoints.save(state(2), best=True)
    assert checkpoints.load()[0]["epoch"] == 1
    assert [p.name for p in checkpoints.folder.iterdir()] == ["latest.pt"]


def test_no_checkpoint_is_an_error_that_names_the_folder(checkpoints):
    assert not checkpoints.exists()
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoints.load()
    with pytest.raises(CheckpointError, match="is not there"):
        read(checkpoints.best)


def test_a_file_of_others_or_of_another_version_is_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="is not a growfx checkpoint"):
        read(tmp_path / "a.pt")
    torch.save({"format": "growfx-checkpoint", "version": 9, "digest": "", "state": {}}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="has version 9; this growfx reads version 1"):
        read(tmp_path / "b.pt")


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    torch.save({"format": "growfx-checkpoint", "call": os.getcwd}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="is damaged"):
        read(tmp_path / "evil.pt")


def test_the_digest_sees_types_order_and_bits():
    values = [
        1,
        1.0,
        True,
        "1",
        None,
        [1],
        (1,),
        {1: 1},
        torch.tensor(1),
        torch.tensor(1.0),
        torch.tensor([1]),
    ]
    digests = [content_digest(v) for v in values]
    assert len(set(digests)) == len(values)
    assert content_digest(0.0) != content_digest(-0.0)
    assert content_digest({"a": 1, "b": 2}) != content_digest({"b": 2, "a": 1})
    assert content_digest(["ab", "c"]) != content_digest(["a", "bc"])
    assert content_digest(torch.zeros(2, 3)) != content_digest(torch.zeros(3, 2))
    for dtype in (torch.bfloat16, torch.float16, torch.bool, torch.complex64):
        assert content_digest(torch.ones(3, dtype=dtype)) != content_digest(torch.zeros(3, dtype=dtype))
